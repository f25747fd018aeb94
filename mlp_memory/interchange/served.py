"""Runs an exported model: `serving` wrote this file and what lies beside it.

    python served.py --prompt='1 45 7' --prompt='1 9'          # token ids, one text each
    model = served.Model("DIR"); model.generate([[1, 45, 7], [1, 9]], max_tokens=20)

Needs jax, numpy and safetensors; nothing else, and no model code. The programs are StableHLO
(`jax.export`): `prefill` reads the prompts, `step` reads a token of each row and draws the next.
"""

import argparse
import hashlib
import json
import pathlib
import sys

import jax
import numpy as np
import safetensors.numpy
from jax import export


class Model:
    """An exported model, loaded.

    Args:
      folder: what `serving` wrote.

    Raises:
      ValueError: a file is missing or is not what was written.
    """

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)
        self.facts = json.loads(self._read("serving.json", None))
        files = self.facts["files"]
        self._prefill, self._step = (
            export.deserialize(bytearray(self._read(name, files[name])))
            for name in ("prefill.stablehlo", "step.stablehlo")
        )
        tensors = safetensors.numpy.load(self._read("weights.safetensors", files["weights.safetensors"]))
        self._weights = [jax.numpy.asarray(tensors[name]) for name in self.facts["weights"]]
        self._begin = jax.jit(self._prefill.call)
        # The state of a step is used up by the next.
        self._advance = jax.jit(self._step.call, donate_argnums=1)

    def _read(self, name, sha256):
        try:
            data = (self._folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"{self._folder / name} cannot be read: {error.strerror}") from error
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{self._folder / name} is not what was exported: export it again")
        return data

    def generate(self, prompts, max_tokens=None, seed=0):
        """The tokens that follow each prompt, up to its end of text, which is left out.

        Args:
          prompts: lists of token ids, one at least each; of any lengths up to `prompt_tokens`.
          max_tokens: most to add; None for as many as there is room for.
          seed: of the draws, where the model draws.

        Raises:
          ValueError: more prompts, longer prompts or more tokens than the programs have room for.
        """
        facts, found = self.facts, []
        most, vocabulary = facts["max_tokens"], facts["vocab_size"]
        max_tokens = most if max_tokens is None else max_tokens
        if not 1 <= max_tokens <= most:
            raise ValueError(f"max_tokens = {max_tokens}: this export has room for 1 to {most}")
        for number, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= facts["prompt_tokens"]:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens: give 1 to {facts['prompt_tokens']}"
                )
            if not all(0 <= token < vocabulary for token in prompt):
                raise ValueError(f"prompt {number} has a token outside 0 to {vocabulary - 1}")
        for start in range(0, len(prompts), facts["batch"]):
            found += self._continue(prompts[start : start + facts["batch"]], max_tokens, seed)
        return found

    def _continue(self, prompts, max_tokens, seed):
        tokens = np.zeros((self.facts["batch"], self.facts["prompt_tokens"]), np.int32)
        lengths = np.ones(self.facts["batch"], np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        seed = np.uint32(seed)
        state = self._begin(self._weights, [tokens, lengths], seed)
        texts, going = [[] for _ in prompts], set(range(len(prompts)))
        for count in range(max_tokens):
            token = np.asarray(state[self.facts["token"]])
            for row in sorted(going):
                if token[row] == self.facts["eos"]:
                    going.discard(row)
                else:
                    texts[row].append(int(token[row]))
            if not going or count + 1 == max_tokens:
                break
            state = self._advance(self._weights, state, seed)
        return texts


def main():
    """Reads the command line and prints a line of token ids for each prompt."""
    parser = argparse.ArgumentParser(description="Continues texts given as token ids.")
    parser.add_argument("--folder", default=pathlib.Path(__file__).parent)
    parser.add_argument("--prompt", action="append", required=True, help="token ids with spaces between")
    parser.add_argument("--max_tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        prompts = [[int(word) for word in prompt.split()] for prompt in args.prompt]
        texts = Model(args.folder).generate(prompts, args.max_tokens, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for text in texts:
        print(*text)


if __name__ == "__main__":
    main()
