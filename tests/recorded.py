"""Gradients of a real small GPT, recorded while torch's AdamW trains it, and AdamW's results on them in float64 and in torch."""
import dataclasses
import math

import numpy as np
import torch
from torch import nn

from demo import data as demo_data
from demo import model as demo_model
from plain_client import Tensor

LEARNING_RATES = (3e-3, 1e-3)
BETAS, EPS, WEIGHT_DECAYS, MAX_NORM = (0.9, 0.99), 1e-8, (0.1, 0.0), 0.5


class Gpt(nn.Module):
    """A decoder-only transformer with biases, norms and a big embedding: tensors of every size."""

    def __init__(self, vocabulary, width, layers, context):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.token(tokens) + self.position.weight[:tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


@dataclasses.dataclass
class Recording:
    """A recorded training. Arrays are float32 by tensor name; `groups` lists names with and without weight decay."""
    tensors: list
    groups: list
    initial: dict
    gradients: list
    torch_final: dict

    def group_values(self):
        return [{"lr": rate, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": decay}
                for rate, decay in zip(LEARNING_RATES, WEIGHT_DECAYS)]

    def float64_final(self):
        """Compute AdamW with clipping in float64: torch's formulas, in numpy."""
        group_of = {name: group for group, names in enumerate(self.groups) for name in names}
        weights = {name: array.astype("f8") for name, array in self.initial.items()}
        first = {name: np.zeros_like(array) for name, array in weights.items()}
        second = {name: np.zeros_like(array) for name, array in weights.items()}
        for step, gradients in enumerate(self.gradients, start=1):
            norm = np.sqrt(sum(np.sum(gradient.astype("f8")**2) for gradient in gradients.values()))
            clip = min(1.0, MAX_NORM / (norm + 1e-6))
            for name, gradient in gradients.items():
                rate, decay = LEARNING_RATES[group_of[name]], WEIGHT_DECAYS[group_of[name]]
                gradient = gradient.astype("f8") * clip
                first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
                second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
                root = np.sqrt(second[name]) / np.sqrt(1 - BETAS[1]**step) + EPS
                weights[name] = weights[name] * (1 - rate * decay) - rate / (1 - BETAS[0]**step) * first[name] / root
        return weights


def _weights(model):
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def group_names(model):
    """Return the names of the matrices, which decay, and of the rest."""
    parameters = list(model.named_parameters())
    return [[name for name, parameter in parameters if parameter.dim() >= 2],
            [name for name, parameter in parameters if parameter.dim() < 2]]


def torch_groups(model, rates=LEARNING_RATES):
    """Return the two groups with their learning rates and weight decays, in torch's form."""
    parameters = dict(model.named_parameters())
    return [{"params": [parameters[name] for name in names], "lr": rate, "weight_decay": decay}
            for names, rate, decay in zip(group_names(model), rates, WEIGHT_DECAYS)]


def loss_of(model, tokens):
    """Return the mean cross entropy of int64 tokens [batch, context + 1], each given those before it."""
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def record(model, batch_of_step, steps, path=None):
    """Train `model` for `steps` with torch.optim.AdamW and clip_grad_norm_, and record every gradient before clipping.

    batch_of_step(step) returns int64 tokens [batch, context + 1]. path: a file for the gradients of a large model.
    """
    optimizer = torch.optim.AdamW(torch_groups(model), betas=BETAS, eps=EPS)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    store = np.memmap(path, "<f4", "w+", shape=(steps, ends[-1])) if path else np.empty((steps, ends[-1]), "<f4")
    initial = _weights(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch_of_step(step)).backward()
        torch.cat([parameter.grad.flatten() for parameter in model.parameters()], out=torch.from_numpy(store[step]))
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    gradients = [{name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), np.split(row, ends[:-1]))} for row in store]
    tensors = [Tensor(name, shape) for name, shape in shapes.items()]
    return Recording(tensors, group_names(model), initial, gradients, _weights(model))


def small_gpt_recording(seed, steps=50):
    """Record 3.1 M parameters on a Markov source of tokens, which the model can learn."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    vocabulary, context = 4500, 24
    successors = generator.integers(vocabulary, size=(vocabulary, 4))

    def batch_of_step(step):
        tokens = [generator.integers(vocabulary, size=4)]
        for _ in range(context):
            tokens.append(successors[tokens[-1], generator.integers(4, size=4)])
        return torch.from_numpy(np.stack(tokens, axis=1))

    return record(Gpt(vocabulary, 256, 1, context), batch_of_step, steps)


class Demo:
    """The demo's model, seeded, and its batches."""

    def __init__(self, seed):
        self.seed, self.config, self.text = seed, demo_model.ModelConfig(), demo_data.load_text()

    def model(self):
        return demo_model.seeded_model(self.config, self.seed)

    def batch(self, step):
        return demo_data.batch(self.text.train, seed=self.seed, step=step, count=4, context=self.config.context)


def demo_recording(demo, path, steps=50):
    """Record 9.6 M parameters on the standard library's source; the gradients are in a file (1.9 GB)."""
    return record(demo.model(), demo.batch, steps, path)
