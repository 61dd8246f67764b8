import random
import socket


def free_port() -> int:
    """A port that nobody listens on, outside the range that outgoing connections take theirs from."""
    while True:
        port = random.SystemRandom().randint(15000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
