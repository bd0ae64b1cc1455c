# A client of echo.py at every address that is named, as that one names them, and at vsock:CID:PORT: has all back that it sends, and the end
# of a stream after its own. Says `whole` and how many there were.
import os, socket, sys, threading

PATIENCE = 60


def connected(word):
    kind, _, address = word.partition(":")
    types = {"udp": socket.SOCK_DGRAM, "datagrams": socket.SOCK_DGRAM, "messages": socket.SOCK_SEQPACKET}
    family = socket.AF_UNIX
    if kind in ("tcp", "udp", "vsock"):
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = (host, int(port))
    if kind == "vsock":
        family, address = socket.AF_VSOCK, (int(address[0]), address[1])
    sock = socket.socket(family, types.get(kind, socket.SOCK_STREAM))
    sock.settimeout(PATIENCE)
    if kind == "datagrams":
        sock.bind("")  # a name of the kernel's choice, to which an answer can go
    sock.connect(address)
    return sock


def stream(sock):
    sent = os.urandom(1 << 20)
    sender = threading.Thread(target=lambda: (sock.sendall(sent), sock.shutdown(socket.SHUT_WR)))
    sender.start()
    came = bytearray()
    while data := sock.recv(1 << 16):
        came += data
    sender.join()
    assert came == sent, f"{len(came)} of {len(sent)} bytes came back, or others"


def messages(sock):
    for length in (1, 5, 60_000):
        sent = os.urandom(length)
        sock.send(sent)
        came = sock.recv(1 << 18)
        assert came == sent, f"{len(came)} of {length} bytes came back, or others"


for word in sys.argv[1:]:
    with connected(word) as sock:
        try:
            (stream if sock.type == socket.SOCK_STREAM else messages)(sock)
        except Exception as error:
            sys.exit(f"{word}: {error!r}")
print("whole", len(sys.argv) - 1)
