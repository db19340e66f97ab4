from .client import check_llm as check_llm
from .client import check_server as check_server
from .counted_prompts import collect_vllm as collect_vllm
from .plugin import register as register
from .wishes import plan_args as plan_args
from .wishes import stats_args as stats_args
