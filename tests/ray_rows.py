"""Two Ray workers give the rows of one process. `tests/wheel.sh` runs it where the extra `ray` has just been installed."""
import ray

from s3ft_nb.core.files import resource
from s3ft_nb.lm.engine import make_engine

options = {"model": str(resource("data", "micro-base")), "quantization": "none", "dtype": "float32", "batch_size": 4, "max_new_tokens": 8}
rows = [{"id": str(i), "messages": [{"role": "user", "content": "Hello! " * (1 + i % 5)}]} for i in range(16)]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
assert make_engine("ray", workers=2, **options).generate(rows) == make_engine("transformers", **options).generate(rows)
print("ray: 1 passed, 0 failed")
