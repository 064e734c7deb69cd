"""What scoring costs beside training on the same rows, by what trains: LoRA, DoRA, a saved head, the model in full.

    python -m tests.benchmarks.trained_kinds --kinds lora dora modules_to_save full

CPU seconds of one thread, so that other programs on the machine count little, and the peak memory of a process that
does only the one or the other. The model has the shape of SmolLM2-135M, its weights are random. Training is a forward
and a backward, without an optimizer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spice_trainer.config import DEFAULT_SKETCH_DIM
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.gradients.sketch import GradientSketch
from spice_trainer.scoring.features import FeatureBuffer

ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_tokens": {"trainable_token_indices": list(range(16))},
}
KINDS = (*ADAPTERS, "full")


def build(kind: str) -> nn.Module:
    """The model with what trains."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49_152, tie_word_embeddings=kind in ("full", "trainable_tokens"),
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    if kind == "full":
        return model
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", **ADAPTERS[kind])
    return get_peft_model(model, adapter)


def measure(kind: str, work: str, num_rows: int, num_tokens: int, repeats: int, sender: Connection) -> None:
    """Sends the median CPU seconds of one pass over the rows, and this process's peak memory in bytes."""
    torch.set_num_threads(1)
    model = build(kind)
    input_ids = torch.randint(5, 49_000, (num_rows, num_tokens))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    labels = input_ids.clone()
    labels[:, : num_tokens // 2] = -100
    modules = find_trained_modules(model)
    sizes = [layer.num_coordinates for layer in scored_layers(modules)]
    sketch = GradientSketch(sizes, DEFAULT_SKETCH_DIM, seed=0) if work == "score" else None

    def train() -> None:
        model.train()
        model(**inputs, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)

    def score() -> None:
        buffer = FeatureBuffer(num_rows, sizes, sketch, torch.device("cpu"))
        buffer.begin(range(num_rows))
        with SampleGradients(model, modules) as sample_gradients:
            buffer.finish(sample_gradients.compute(inputs, labels, buffer))

    seconds = []
    for _ in range(repeats + 1):
        started = time.process_time()
        (train if work == "train" else score)()
        seconds.append(time.process_time() - started)
    # The first one warms up.
    sender.send((median(seconds[1:]), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    print("kind | rows x tokens | train s | score s | score / train | peak train GB | peak score GB | ratio")
    for kind in options.kinds:
        for num_tokens in options.tokens:
            found = []
            for work in ("train", "score"):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=measure, args=(kind, work, options.rows, num_tokens, options.repeats, sender)
                )
                process.start()
                sender.close()
                found.append(receiver.recv())
                process.join()
            (train, train_peak), (score, score_peak) = found
            print(
                f"{kind} | {options.rows} x {num_tokens} | {train:.2f} | {score:.2f} | {score / train:.2f} | "
                f"{train_peak / 1e9:.2f} | {score_peak / 1e9:.2f} | {score_peak / train_peak:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
