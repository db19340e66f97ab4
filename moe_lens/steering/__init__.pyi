from .baking import bake as bake
from .context import steered as steered
from .controls import bottom_set as bottom_set
from .controls import random_sets as random_sets
from .hooks import steer_hooks as steer_hooks
from .plan import SteeringPlan as SteeringPlan
from .published import PublishedRanking as PublishedRanking
from .published import read_published_ranking as read_published_ranking
