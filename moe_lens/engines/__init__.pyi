from .vllm.client import check_llm as check_llm
from .vllm.client import check_server as check_server
from .vllm.counted_prompts import collect_vllm as collect_vllm
from .vllm.wishes import plan_args as plan_args
from .vllm.wishes import stats_args as stats_args
