"""16 threads call, train, freeze and thaw one model; argument: for how many seconds."""

import random
import sys
import threading
import time

import torch
from torch import nn

import fastlinear


def main() -> None:
    model = fastlinear.convert(
        nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), tune="off"
    )
    torch.set_num_threads(2)
    until, faults, calls = time.monotonic() + float(sys.argv[1]), [], [0] * 16

    def work(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < until and not faults:
            x = torch.randn(draw.choice((1, 3, 8, 33)), 64)
            try:
                if number == 0 and draw.random() < 0.1:
                    fastlinear.freeze(model)
                    fastlinear.unfreeze(model)
                elif number == 1:
                    loss = model(x).square().mean()
                    if loss.requires_grad:
                        loss.backward()
                    with torch.no_grad():
                        for parameter in model.parameters():
                            if parameter.grad is not None:
                                parameter.sub_(parameter.grad, alpha=1e-4)
                                parameter.grad = None
                else:
                    with torch.no_grad():
                        model(x)
                calls[number] += 1
            except Exception as error:
                faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{sum(calls)} calls")
    if faults:
        raise faults[0]


if __name__ == "__main__":
    main()
