r"""Compare ways to choose training rows: arms × seeds from one YAML file, on your own model and data.

```
python examples/compare.py run examples/compare_small.yaml --data instructions.jsonl.gz
python examples/compare.py report examples/compare_small.yaml
python examples/compare.py run examples/compare_lab.yaml --data instructions.jsonl.gz --regimes targeted
```

Every arm has the same model, rows, optimizer steps and batch, starts from the same adapter and sees the same pools;
only what it picks from them differs. `run` does what is missing and can be interrupted at any time. `report` writes
tables and plots from what is finished. `compare_lab.yaml` takes seconds to a minute an arm: the layers below the
adapter run once for every row. Its regimes are training rows that differ from the wanted ones in known ways.
"""

from __future__ import annotations

import argparse
import warnings

import transformers
from comparison.driver import run_comparison
from comparison.report import write_report
from comparison.settings import load_settings
from datasets import disable_progress_bars


def main() -> None:
    """Run a comparison, or report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("config", help="YAML file of the comparison")
    parser.add_argument("--data", help="file of rows, in place of the YAML file's")
    parser.add_argument("--model", help="model, in place of the YAML file's")
    parser.add_argument("--output_dir", help="where results go, in place of the YAML file's")
    parser.add_argument("--arms", nargs="+", help="run these arms only")
    parser.add_argument("--regimes", nargs="+", help="these regimes only, where the YAML file has some")
    parser.add_argument("--seeds", nargs="+", type=int, help="run these seeds only, beside another that runs others")
    options = parser.parse_args()
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    overrides = {name: getattr(options, name) for name in ("data", "model", "output_dir")}
    settings = load_settings(options.config, overrides)
    if options.command == "run":
        run_comparison(settings, options.arms, options.seeds, options.regimes)
    else:
        write_report(settings, options.regimes)


if __name__ == "__main__":
    main()
