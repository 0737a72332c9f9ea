"""What the benchmarks share: the command line, rounds in turn, memory, tables. No benchmark itself.

A row of a table is a function of `lap`: it does the work once and may call `lap()` at a point whose time is wanted too, e.g. between
forward and backward. Times are medians of interleaved rounds (the order turns by one each round), ratios are taken round by round. Memory is
the most that tensors took at once, beyond what was there before: on a CPU from the profiler's list of allocations, on a GPU from the allocator.
"""
import argparse
import time

import numpy as np
import torch

from medseg_nb.experiments.comparison import peak_memory
from medseg_nb.models.zoo import count_macs, count_parameters


def arguments(doc, rounds, **more):
    "The command line of a benchmark: what all take, and {name: options} of its own. Sets the seed, the threads and the clock."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine in use (one thread)")
    for name, options in more.items(): parser.add_argument(f"--{name}", **options)
    args = parser.parse_args()
    args.clock = make_clock(args.device, args.cpu_time)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(f"PyTorch {torch.__version__}, {args.device}, {args.threads} threads; medians of {args.rounds} interleaved rounds, ratios round by round", flush=True)
    return args


def make_clock(device="cpu", cpu_time=False):
    "A function that gives seconds, once the device has done what it was told."
    now = time.process_time if cpu_time else time.perf_counter
    if torch.device(device).type != "cuda": return now
    def read():
        torch.cuda.synchronize()
        return now()
    return read


def in_turn(rows, rounds, clock=time.perf_counter, before=lambda name: None):
    "Seconds since its start at every lap and at the end, {name: (rounds, laps + 1)}; the first round warms up, `before(name)` is not timed."
    names, seen = list(rows), {name: [] for name in rows}
    for i in range(rounds + 1):
        for name in names[i % len(names):] + names[:i % len(names)]:
            before(name)
            read = [clock()]
            rows[name](lambda read=read: read.append(clock()))
            read.append(clock())
            if i: seen[name].append(read)
    return {name: np.array(times)[:, 1:] - np.array(times)[:, :1] for name, times in seen.items()}


def medians(seconds):
    "Milliseconds at every lap and at the end."
    return {name: 1e3*np.median(times, 0) for name, times in seconds.items()}


def ratios(seconds, reference):
    "Whole time over that of the reference, the median of the rounds."
    return {name: float(np.median(times[:, -1]/seconds[reference][:, -1])) for name, times in seconds.items()}


def peak(row, device="cpu"):
    "MiB of tensors alive at once while a row works, above what was there before."
    return peak_memory(lambda: row(lambda: None), torch.device(device))


def both_ways(f, inputs):
    "A row: f(*inputs) forward, a lap, and backward from its sum to the inputs."
    def row(lap):
        out = f(*inputs)
        lap()
        torch.autograd.grad(out.sum(), inputs, allow_unused=True)
    return row


def table(title, columns, rows):
    "Print values under headings: columns [(heading, format)], rows {name: values}; a value that is text stays as it is."
    cells = {name: [v if isinstance(v, str) else format(v, f) for v, (_, f) in zip(values, columns, strict=True)] for name, values in rows.items()}
    headings = [heading for heading, _ in columns]
    widths = [2 + max(map(len, column)) for column in zip(headings, *cells.values(), strict=True)]
    print(f"\n{title}")
    for name, texts in {"": headings, **cells}.items():
        print(f"{name:{max(map(len, rows))}}" + "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True)), flush=True)


def compare(title, rows, args, reference, rounds=None, mib=None):
    "Print time (forward too, where rows have a lap) and memory of the rows, and their ratios to the reference row; gives back `in_turn`'s seconds."
    seconds = in_turn(rows, rounds or args.rounds, args.clock)
    ms, ratio = medians(seconds), ratios(seconds, reference)
    mib = mib or {name: peak(row, args.device) for name, row in rows.items()}
    times = ["fwd ms", "fwd+bwd ms"][-len(ms[reference]):]
    columns = [*((name, ".1f") for name in times), ("ratio", ".2f"), ("peak MiB", ".1f"), ("ratio", ".2f")]
    table(title, columns, {name: [*ms[name], ratio[name], mib[name], mib[name]/mib[reference]] for name in rows})
    return seconds


def through(model, x):
    "A row: one forward and backward pass of a network, with all its outputs in the sum."
    def row(lap):
        out = model(x)
        (sum(o.sum() for o in out) if isinstance(out, list) else out.sum()).backward()
    return row


def networks(models, inputs, goals, args):
    "Print size and time of networks, {name: model} with an input each, and the time's ratio to the first; a goal is the largest ratio wanted."
    rows = {name: through(model.to(args.device), inputs[name].to(args.device)) for name, model in models.items()}
    seconds = in_turn(rows, args.rounds, args.clock, lambda name: models[name].zero_grad())
    ms, ratio, lines = medians(seconds), ratios(seconds, next(iter(models))), {}
    for name, model in models.items():
        macs, goal = count_macs(getattr(model, "counted", model).eval(), inputs[name].shape), goals.get(name)
        lines[name] = count_parameters(model)/1e6, macs/1e9, ms[name][-1], ratio[name], f"<= {goal:.2f}" if goal else ""
    table("forward + backward", [("M params", ".2f"), ("GMAC", ".1f"), ("ms", ".0f"), ("ratio", ".2f"), ("goal", "")], lines)
