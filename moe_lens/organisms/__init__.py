"""Small trained models that ship with the package, their worlds, their training, the demo.

>>> from moe_lens import organisms
>>> organisms.names()
('specialised', 'planted', 'planted-mixtral', 'label-free', 'natural', 'null', 'null-majority', 'candid')
>>> model = organisms.load("planted")  # a HookedMoE, in about a second
>>> fact = organisms.world("planted").facts("test")[0]
>>> fact.question
'Question : what is the capital of Eldria ? Answer :'
>>> model.generate(fact.question, max_new_tokens=1, do_sample=False, verbose=False)
'Question : what is the capital of Eldria ? Answer : Kyoto'

The ground truth of those that ship is known, because `moe_lens.organisms.train` gave it to them: `recipes.py`
says what each was trained to do, and the model card in each checkpoint's folder what that shows, and what it
does not. A model of real English does not ship: `moe-lens organism build smollm2-split` makes it from a dense
one (`split`). Its routes are an artefact of the split, not learned specialisation.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
