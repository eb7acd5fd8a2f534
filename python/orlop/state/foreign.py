"""Optimizer states of bitsandbytes and torchao: read with the code books they carry, and written so that those libraries load them.

Read: a value is ``book[code] * absmax``, in fp32, with the stored book and never an assumed one. Where the servers keep a state in the
same form (bits, blocks that their own divide, a book within 2 ulp of the closed form), codes and scales are set as they are; elsewhere
the decoded values are, in fp32 or requantised with the rounding of the group.

Both libraries' Adam and torch's have the same moments, but not the same decay: bitsandbytes' Adam decouples it, torch's and torchao's add
it to the gradient. bitsandbytes on CUDA decays after the update, and its RMSprop and Adagrad keep the second moment in the signed book.

Sources: bitsandbytes 0.50.2 ``optim/optimizer.py`` and torchao 0.18 ``optim/subclass_*.py``, ``optim/adam.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .. import kernels
from ..job.job import TrainingJob
from ..job.wire import Part, part
from ..names import shape_of

if TYPE_CHECKING:
    from ..optim.optimizer import Optimizer

FORMATS = ("torch", "bitsandbytes", "torchao")
BOOK_ULPS = 2  # how far a library's book may be from the closed form: torch's linspace sets the last bits

_WRAPPER = "__bnb_optimizer_quant_state__"  # around bitsandbytes' tensors since 0.49.2
_BNB_BLOCKS = (256, 2048)                   # 2048 before 0.44.0
_BNB_STATE = ("step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "unorm_vec", "gnorm_vec")
_BNB_WHOLE_TENSOR = ("max1", "max2", "new_max1", "new_max2")  # of block_wise=False, which went in 0.50.0
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}        # torchao has Adam and AdamW


@dataclass(frozen=True)
class Quantised:
    """A state as codes, in any library's book.

    Attributes
    ----------
    codes : torch.Tensor
        uint8, one per element, of the parameter's shape; 4-bit codes unpacked.
    absmax : torch.Tensor
        fp32, one per `block` consecutive elements, the last block short.
    book : torch.Tensor
        fp32 [256 or 16], ascending.
    block : int

    Examples
    --------
    >>> book = kernels.code_book("8bit", True)
    >>> Quantised(torch.tensor([127, 255], dtype=torch.uint8), torch.tensor([2.0]), book, 256).float()
    tensor([0., 2.])
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    book: torch.Tensor
    block: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def state(self) -> str:
        """The name of its format here: ``"8bit"`` or ``"4bit"``."""
        return "8bit" if self.book.numel() == 256 else "4bit"

    def clone(self) -> Quantised:
        return replace(self, codes=self.codes.clone(), absmax=self.absmax.clone(), book=self.book.clone())

    def float(self) -> torch.Tensor:
        """``book[code] * absmax`` in fp32, of the parameter's shape: one rounding, as in the libraries."""
        codes = self.codes.reshape(-1)
        return (self.book[codes.long()] * self.absmax.repeat_interleave(self.block)[:codes.numel()]).view(self.shape)

    def fits(self, state: str, is_signed: bool) -> bool:
        """Whether the servers' ``state`` has these codes and blocks and, within :data:`BOOK_ULPS`, this book."""
        if state != self.state or self.block % kernels.BLOCK[state]:
            return False
        ulps = self.book.view(torch.int32).long() - kernels.code_book(state, is_signed).view(torch.int32).long()
        return int(ulps.abs().max()) <= BOOK_ULPS

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales as the servers store them, flat: 4-bit codes in pairs, the first one low; one scale per block of theirs."""
        count, own = self.codes.numel(), kernels.BLOCK[self.state]
        codes = _packed(self.codes.reshape(-1), first_is_low=True) if self.state == "4bit" else self.codes.reshape(-1)
        return codes, self.absmax.repeat_interleave(self.block // own)[:-(-count // own)].contiguous()


# Reading.

def to_torch(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with torch's names for `optimizer`'s states, from one of torch (as it is), bitsandbytes or torchao.

    Parameters
    ----------
    optimizer : Optimizer
        Which will load it. Nothing of it is changed.
    state_dict : dict
        As torch.optim, bitsandbytes (8 and 32 bit; wrapped or not) or torchao (its tensors, or mappings of theirs: ``codes``, ``scale``
        and ``qmap``) made it.

    Returns
    -------
    dict
        Its states are :class:`Quantised` where the library's are.

    Raises
    ------
    ValueError
        Anything that is not understood completely: unknown keys, books of another length than 256 or 16 or not ascending, scales that
        do not match the tensor or are not finite, shapes, states the optimizer does not have. It names tensor, value and limit.
    """
    state, groups = state_dict["state"], state_dict["param_groups"]
    parameters = _parameters(optimizer, groups)
    if _is_bitsandbytes(optimizer, state, groups):
        reader, groups = _from_bitsandbytes, [_group_from_bitsandbytes(optimizer, group) for group in groups]
    elif any(_is_torchao(value) for values in state.values() for value in values.values()):
        reader, groups = _from_torchao, [{**group, "lr": float(group["lr"])} for group in groups]
    else:
        reader = None
    states = {}
    for number, (name, parameter) in parameters.items():
        values = state.get(number, {})
        states[number] = reader(optimizer, name, parameter, values) if reader is not None and values else values
        _check_shapes(optimizer, name, parameter, states[number])
    return state_dict if reader is None else {"state": states, "param_groups": groups}


def parts(job: TrainingJob, index: int, slot: str, value: Quantised, applied_count: int, stored: dict[str, Any]) -> list[Part]:
    """What a LOAD step sends of one quantised state.

    Parameters
    ----------
    stored : dict
        The tensor as ``list_tensors`` tells it: ``optimizer`` and ``state`` decide whether codes can stay as they are.
    """
    if stored["state"] in kernels.BLOCK and value.fits(stored["state"], kernels.optimizers()[stored["optimizer"]]["states"][slot]):
        codes, absmax = value.stored()
        whole = (0, value.codes.numel())
        return [part(index, codes, slot, whole, applied_count), part(index, absmax, f"{slot}_absmax", whole, applied_count)]
    return [part(index, value.float(), slot, applied_count=applied_count)]


def _parameters(optimizer: Optimizer, groups: list[dict[str, Any]]) -> dict[int, tuple[str, torch.Tensor]]:
    """Name and parameter by the number that `groups` give it."""
    model = optimizer._session.model if optimizer._session is not None else None
    names = {id(parameter): name for name, parameter in model.named_parameters()} if model is not None else {}
    found = {}
    for place, (own, group) in enumerate(zip(optimizer.param_groups, groups)):
        given = own.get("param_names", ())
        for position, (parameter, number) in enumerate(zip(own["params"], group["params"])):
            name = names.get(id(parameter)) or (given[position] if position < len(given) else f"parameter {position} of group {place}")
            found[number] = (name, parameter)
    return found


def _check_shapes(optimizer: Optimizer, name: str, parameter: torch.Tensor, values: dict[str, Any]) -> None:
    for slot in optimizer.slots_of(parameter):
        value, expected = values.get(slot), shape_of(slot, parameter.shape)
        if value is not None and list(value.shape) != expected:
            raise ValueError(f"{slot} of {name!r} has shape {list(value.shape)}; expected {expected}")


def _quantised(name: str, what: str, codes: torch.Tensor, absmax: torch.Tensor, book: torch.Tensor, blocks: tuple[int, ...]) -> Quantised:
    """Checked; `blocks`: the sizes of block allowed. The first with as many scales as there are counts."""
    _check_book(name, what, book)
    count, length = codes.numel(), absmax.numel()
    fitting = [block for block in blocks if -(-count // block) == length]
    if absmax.dim() != 1 or not fitting:
        wanted = " or ".join(f"{-(-count // block)} (blocks of {block})" for block in blocks)
        raise ValueError(f"scales of {what} of {name!r} have shape {list(absmax.shape)}; {count} elements have {wanted}")
    absmax = absmax.detach().cpu().float()
    wrong = ~(absmax.isfinite() & (absmax >= 0))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(f"scale {place} of {what} of {name!r} is {float(absmax[place])}; finite and at least 0")
    if count and int(codes.max()) >= book.numel():
        raise ValueError(f"{what} of {name!r} has code {int(codes.max())}; its book has {book.numel()} entries")
    return Quantised(codes.detach().cpu().contiguous(), absmax.contiguous(), book.detach().cpu().contiguous(), fitting[0])


def _check_book(name: str, what: str, book: torch.Tensor) -> None:
    if book.dtype != torch.float32 or book.dim() != 1 or book.numel() not in (256, 16):
        raise ValueError(f"the code book of {what} of {name!r} is {book.dtype} {list(book.shape)}; float32 with 256 or 16 entries")
    if not book.isfinite().all():
        raise ValueError(f"the code book of {what} of {name!r} has an entry that is not finite")
    falls = (book[1:] < book[:-1]).nonzero()
    if len(falls):  # equal neighbours are fine: bitsandbytes 0.36 to 0.41.0 wrote such books
        place = int(falls[0])
        raise ValueError(f"the code book of {what} of {name!r} is not ascending: entry {place} is {float(book[place])}, "
                         f"entry {place + 1} is {float(book[place + 1])}")


def _count(name: str, values: dict[str, Any]) -> torch.Tensor:
    step = values.get("step")
    if step is None or not float(step) >= 0 or float(step) != int(float(step)):
        raise ValueError(f"step of {name!r} is {step}; a whole number, at least 0")
    return torch.tensor(float(step))


# bitsandbytes.

def _is_bitsandbytes(optimizer: Optimizer, state: dict[int, Any], groups: list[dict[str, Any]]) -> bool:
    if any(state.values()):
        return any(_WRAPPER in values or "state1" in values for values in state.values())
    return any("t_alpha" in group or "betas" in group and "betas" not in own for own, group in zip(optimizer.param_groups, groups))


def _bitsandbytes_slots(optimizer: Optimizer) -> tuple[tuple[str, ...], ...]:
    """The states in ``state1``, and in ``state2`` if there is one; AdEMAMix stacks two in the first."""
    slots = optimizer.slots
    if slots == ("exp_avg", "exp_avg_slow", "exp_avg_sq"):
        return slots[:2], slots[2:]
    if len(slots) > 2:
        raise ValueError(f"bitsandbytes' {type(optimizer).__name__} keeps neither momentum nor a mean gradient; this optimizer has {slots}")
    return tuple((slot,) for slot in slots)


def _from_bitsandbytes(optimizer: Optimizer, name: str, parameter: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
    values = {**{key: value for key, value in values.items() if key != _WRAPPER}, **values.get(_WRAPPER, {})}
    if old := [key for key in _BNB_WHOLE_TENSOR if key in values]:
        raise ValueError(f"{', '.join(old)} of {name!r}: states scaled by whole tensors (bitsandbytes before 0.50, block_wise=False) are "
                         "not taken; block-wise ones are")
    if unknown := [key for key in values if key not in _BNB_STATE]:
        raise ValueError(f"unknown in the bitsandbytes state of {name!r}: {', '.join(map(str, unknown))}; known: {', '.join(_BNB_STATE)}")
    slots = _bitsandbytes_slots(optimizer)
    if len(slots) < 2 and "state2" in values:
        raise ValueError(f"{name!r} has state2; orlop.{type(optimizer).__name__} has one state, {slots[0][0]}")
    read: dict[str, Any] = {"step": _count(name, values)}
    for number, names in enumerate(slots, start=1):
        state = _bitsandbytes_state(name, number, values, stacked=len(names) > 1)
        if len(names) > 1 and len(state) != len(names):
            raise ValueError(f"state{number} of {name!r} has {len(state)} states stacked; expected {len(names)}, {', '.join(names)}")
        read.update(zip(names, state))
    return read


def _bitsandbytes_state(name: str, number: int, values: dict[str, Any], stacked: bool) -> list[Any]:
    """The states in ``state<number>``: one, or those that are stacked along its first dimension."""
    what = f"state{number}"
    state = values.get(what)
    if state is None:
        raise ValueError(f"{what} of {name!r} is missing; there are {', '.join(values)}")
    if state.dtype == torch.float32:
        return list(state) if stacked else [state]
    if state.dtype != torch.uint8:
        raise ValueError(f"{what} of {name!r} is {state.dtype}; float32, or uint8 codes")
    absmax, book = values.get(f"absmax{number}"), values.get(f"qmap{number}")
    if absmax is None or book is None:
        raise ValueError(f"{what} of {name!r} has codes but no {'absmax' if absmax is None else 'qmap'}{number}: a book is never assumed")
    if book.numel() != 256:
        raise ValueError(f"the code book of {what} of {name!r} is {book.dtype} {list(book.shape)}; float32 with 256 entries")
    if not stacked:
        return [_quantised(name, what, state, absmax, book, _BNB_BLOCKS)]
    if absmax.dim() != 2 or len(absmax) != len(state):
        raise ValueError(f"scales of {what} of {name!r} have shape {list(absmax.shape)}; {len(state)} rows expected")
    return [_quantised(name, what, codes, scales, book, _BNB_BLOCKS) for codes, scales in zip(state, absmax)]


def _group_from_bitsandbytes(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    kind = type(optimizer).__name__
    kept = {key: value for key, value in group.items() if key not in ("betas", "eps", "alpha", "t_alpha", "t_beta3")}
    if kind in ("AdamW", "Adam", "AdEMAMix"):
        kept |= {"betas": tuple(group["betas"])[:3 if kind == "AdEMAMix" else 2], "eps": group["eps"]}
    if kind == "Adam" and group["weight_decay"] and not optimizer.param_groups[0]["decoupled_weight_decay"]:
        raise ValueError(f"bitsandbytes' Adam decays weights decoupled (weight_decay={group['weight_decay']}), this one adds it to the "
                         "gradient: load into orlop.AdamW, or set decoupled_weight_decay=True")
    if kind == "AdEMAMix":
        if group["t_alpha"] != group["t_beta3"]:
            raise ValueError(f"t_alpha={group['t_alpha']} and t_beta3={group['t_beta3']} differ; orlop.AdEMAMix has one T for both")
        kept |= {"alpha": group["alpha"], "T": group["t_alpha"] or 0}
    if kind == "Lion":
        kept["betas"] = tuple(group["betas"])
    if kind == "SGD":
        kept |= {"momentum": group["betas"][0], "dampening": 0}  # it has the argument, and its kernels ignore it
    if kind == "RMSprop":
        kept |= {"alpha": group["betas"][0], "eps": group["eps"]}
    if kind == "Adagrad":
        kept["eps"] = group["eps"]
    return kept


# torchao.

def _is_torchao(value: Any) -> bool:
    """One of its tensors, or a mapping of theirs; without importing torchao."""
    return _field(value, "codes") is not None and _field(value, "scale") is not None


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _from_torchao(optimizer: Optimizer, name: str, parameter: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
    unknown = [key for key in values if key != "step" and key not in _MOMENTS]
    if unknown or "max_exp_avg_sq" in values:
        raise ValueError(f"not taken from the torchao state of {name!r}: {', '.join(unknown) or 'max_exp_avg_sq (amsgrad)'}; "
                         "step, exp_avg and exp_avg_sq are")
    read: dict[str, Any] = {"step": _count(name, values)}
    for slot in ("exp_avg", "exp_avg_sq"):
        if slot not in values or slot not in optimizer.slots:
            raise ValueError(f"torchao's state of {name!r} has {', '.join(values)}; orlop.{type(optimizer).__name__} has "
                             f"{', '.join(optimizer.slots)}, and both need {slot}")
        value = values[slot]
        read[slot] = _torchao_state(name, slot, parameter, value) if _is_torchao(value) else value
    return read


def _torchao_state(name: str, slot: str, parameter: torch.Tensor, value: Any) -> Any:
    codes, scale, book = (_field(value, field) for field in ("codes", "scale", "qmap"))
    shape = parameter.shape
    if codes.dtype == torch.float8_e4m3fn:
        if scale.dim() != 1 or not scale.numel() or codes.numel() % scale.numel():
            raise ValueError(f"scales of {slot} of {name!r} have shape {list(scale.shape)}; a number that divides {codes.numel()} elements")
        return (codes.cpu().float().view(scale.numel(), -1) * scale.cpu().float().view(-1, 1)).view(codes.shape)
    if codes.dtype != torch.uint8 or book is None:
        raise ValueError(f"{slot} of {name!r} has codes of {codes.dtype} and {'a' if book is not None else 'no'} qmap; uint8 with a qmap, "
                         "or float8_e4m3fn")
    _check_book(name, slot, book)
    if book.numel() == 16:
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).reshape(-1)  # torchao packs the first one high
        if codes.numel() != shape.numel():
            raise ValueError(f"{slot} of {name!r} has {codes.numel()} codes; expected {shape.numel()}, of shape {list(shape)}")
        codes = codes.view(shape)
    block = codes.numel() // scale.numel() if scale.numel() else 0
    if not block or codes.numel() % scale.numel():
        raise ValueError(f"scales of {slot} of {name!r} have shape {list(scale.shape)}; a number that divides {codes.numel()} elements")
    return _quantised(name, slot, codes, scale, book, (block,))


# Writing.

def export(optimizer: Optimizer, state_dict: dict[str, Any], format: str) -> dict[str, Any]:
    """The state of `optimizer` as another library loads it.

    Parameters
    ----------
    optimizer : Optimizer
    state_dict : dict
        Its plain state_dict, which gives groups and numbers.
    format : str
        ``"bitsandbytes"`` or ``"torchao"`` (Adam and AdamW; it must be installed, as its states are tensors of its own classes).

    Returns
    -------
    dict
        Quantised states are the servers' codes, scales and book, bit for bit; those in fp32 stay so. Both libraries go on with either,
        whatever the parameter's size. 4-bit states are fp32 for bitsandbytes, which has none.

    Raises
    ------
    ValueError
        What the library does not have (Nesterov, dampening, centered RMSprop, L2 decay with bitsandbytes' Adam): it would go on
        with other numbers.
    """
    group_of, write = {"bitsandbytes": (_group_for_bitsandbytes, _for_bitsandbytes),
                       "torchao": (_group_for_torchao, _for_torchao)}[format]
    groups = [group_of(optimizer, group) for group in state_dict["param_groups"]]
    state = {}
    job = optimizer._job
    stored = {t["index"]: t for t in optimizer.session.client.list_tensors(job.core.job)} if job is not None else {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        count = optimizer.state[parameter]["step"]
        if job is None or not parameter.requires_grad or count == 0:
            continue  # as before a parameter's first update
        values = {slot: _read(optimizer, stored[job.index_of[id(parameter)]], slot) for slot in optimizer.slots_of(parameter)}
        state[number] = write(optimizer, parameter, int(count), values)
    return {"state": state, "param_groups": groups}


def _read(optimizer: Optimizer, stored: dict[str, Any], slot: str) -> Quantised | torch.Tensor:
    """A state as the servers store it."""
    state, shape, count = stored["state"], stored["spec"]["shape"], stored["element_count"]
    if state not in kernels.BLOCK:
        return optimizer.session.get(stored["spec"]["name"], slot)
    block = kernels.BLOCK[state]
    codes = torch.empty(count if state == "8bit" else -(-count // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-count // block))
    index, whole = stored["index"], (0, count)
    optimizer._job.core.pull([(index, slot, "U8", whole, codes, None), (index, f"{slot}_absmax", "F32", whole, absmax, None)], latest=True)
    if state == "4bit":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(-1)[:count]
    book = kernels.code_book(state, kernels.optimizers()[stored["optimizer"]]["states"][slot])
    return Quantised(codes.view(shape), absmax, book, block)


def _packed(codes: torch.Tensor, first_is_low: bool) -> torch.Tensor:
    """Flat 4-bit codes in pairs; the last of an odd number alone, beside a 0."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    first, second = codes[::2], codes[1::2]
    return first | second << 4 if first_is_low else first << 4 | second


def _for_bitsandbytes(optimizer: Optimizer, parameter: torch.Tensor, count: int, values: dict[str, Any]) -> dict[str, Any]:
    """Unwrapped, as every version takes it."""
    written: dict[str, Any] = {"step": count}
    for number, names in enumerate(_bitsandbytes_slots(optimizer), start=1):
        states = [values[name] for name in names]
        if isinstance(states[0], Quantised) and states[0].state == "8bit":
            written |= {f"state{number}": _stacked([state.codes for state in states]), f"qmap{number}": states[0].book,
                        f"absmax{number}": _stacked([state.absmax for state in states])}
        else:
            written[f"state{number}"] = _stacked([state.float() for state in states])
    return written


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def _group_for_bitsandbytes(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    kind = type(optimizer).__name__
    _bitsandbytes_slots(optimizer)
    for key in ("nesterov", "dampening", "lr_decay"):
        if group.get(key):
            raise ValueError(f"{key}={group[key]}: bitsandbytes' {kind} has none, and would go on with other numbers")
    if kind == "Adam" and group["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError(f"weight_decay={group['weight_decay']} is added to the gradient here; bitsandbytes' Adam decays decoupled")
    betas = {"SGD": lambda: (group["momentum"], 0.0), "RMSprop": lambda: (group["alpha"], 0.0), "Adagrad": lambda: (0.0, 0.0)}
    written = {key: group[key] for key in ("params", "param_names", "initial_lr", "weight_decay") if key in group}
    written |= {"lr": float(group["lr"]), "eps": group.get("eps", 0.0), "betas": tuple(betas.get(kind, lambda: group["betas"])())}
    if len(optimizer.slots) > 1:
        warm_up = group.get("T") or None
        written |= {"alpha": group.get("alpha", 0.0), "t_alpha": warm_up, "t_beta3": warm_up}
    return written


def _group_for_torchao(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    if set(optimizer.slots) != {"exp_avg", "exp_avg_sq"}:
        raise ValueError(f"torchao has Adam and AdamW; not {type(optimizer).__name__}")
    written = {key: group[key] for key in ("params", "param_names", "initial_lr", "betas", "eps", "weight_decay") if key in group}
    return written | {"lr": torch.tensor(float(group["lr"])), "amsgrad": False}  # its step takes no float


def _for_torchao(optimizer: Optimizer, parameter: torch.Tensor, count: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"step": torch.tensor(float(count)), **{slot: _torchao_tensor(value, parameter, slot) for slot, value in values.items()}}


def _torchao_tensor(value: Any, parameter: torch.Tensor, slot: str) -> torch.Tensor:
    """Blocks are whole in torchao: what its own optimizers would not quantise is fp32."""
    if not isinstance(value, Quantised) or value.codes.numel() % value.block:
        return value.float()
    try:
        from torchao.optim.subclass_4bit import OptimState4bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ImportError("a torchao state_dict has tensors of torchao's own classes: install torchao to make one") from error
    is_signed = slot == "exp_avg"
    if value.state == "8bit":
        return OptimState8bit(value.codes, value.absmax, value.book, is_signed, dtype=parameter.dtype)
    codes = _packed(value.codes.reshape(-1), first_is_low=False)
    return OptimState4bit(codes, value.absmax, value.book, is_signed, value.shape, dtype=parameter.dtype)
