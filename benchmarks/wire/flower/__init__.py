"""What one federated round costs in Flower: the same payload down and up, over loopback.

    python -m benchmarks.wire.flower --megabytes 200 1000 --clients 1 --rounds 4
    python -m benchmarks.wire.flower --tiny                # 2 and 10 clients, 8 bytes

Flower runs as its documentation deploys it: `flower-superlink`, one `flower-supernode` per client,
`flwr run`, all with their defaults but without TLS, telemetry, update check and installation of the
app's dependencies. It lives in a virtual environment of its own, because its pins are not ours.
The app (`app/`) makes float32 arrays of 10 MB, new random values every round; its ServerApp sends
them with `grid.send_and_receive`, its ClientApp answers with the ArrayRecord it got, and the
ServerApp compares every reply bit for bit. A round's time runs from making the ArrayRecord until
all replies are in hand. The first round (connections, the app's installation at every client) is
reported apart.

Not like for like, whatever our own number is:

* Flower moves arrays that are in memory, over several hops with an object store in between
  (ServerApp - SuperLink - SuperNode - ClientApp and back); a file-backed transfer is one hop.
* A ClientApp is a process started anew each round: start-up, imports and the app's installation
  are in the time and the CPU of every round. Ours are long-lived.
* Two polls that sleep 3 s (the grid's for replies, the SuperNode's for messages) and a SuperExec
  that looks for work once a second set a floor of about 3 or 6 s, so small payloads measure the
  polls; an empty round is what `--tiny` is for.
* ServerApp and ClientApp each hold the arrays, as any app that computes with them does; the stores
  of SuperLink and SuperNode hold them too. Peak memory is of all these processes together.
* `cpu_seconds` is of all processes within a round's time: it includes process start-up, not the
  arrays' generation and the equality check, nor what processes do after the last reply.
  `run_cpu_seconds` is all of it, start-up of SuperLink and SuperNodes, generation and check
  included, divided by nothing.
* Objects are addressed by their hash, so with several clients the ServerApp uploads a round's
  arrays once, and a reply equal to what the store still holds for a slower client is not stored
  again. With one client nothing is saved: the request is deleted once the SuperNode has it.
* All processes share one machine's cores; N clients here are not N devices.
"""

from benchmarks.wire.flower.bench import run
from benchmarks.wire.flower.errors import FlowerError

__all__ = ["FlowerError", "run"]
