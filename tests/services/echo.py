# Answers whatever comes with the same, at every address that is named: tcp:HOST:PORT, udp:HOST:PORT, and stream:PATH, datagrams:PATH
# and messages:PATH, which are unix sockets; and at every socket that the service manager has passed (sd_listen_fds(3)). Says `ready` when
# it is at all of them.
import os, socket, sys, threading


def connection(client):
    with client:
        while data := client.recv(1 << 18):
            client.sendall(data)


def accept(listener):
    while True:
        threading.Thread(target=connection, args=(listener.accept()[0],), daemon=True).start()


def answer(sock):
    while True:
        data, sender = sock.recvfrom(1 << 18)
        sock.sendto(data, sender)


def named(word):
    kind, _, address = word.partition(":")
    if kind in ("tcp", "udp"):
        host, _, port = address.rpartition(":")
        family, address = socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port))
    else:
        family = socket.AF_UNIX
    types = {"udp": socket.SOCK_DGRAM, "datagrams": socket.SOCK_DGRAM, "messages": socket.SOCK_SEQPACKET}
    sock = socket.socket(family, types.get(kind, socket.SOCK_STREAM))
    sock.bind(address)
    if family == socket.AF_UNIX:
        os.chmod(address, 0o777)
    if sock.type != socket.SOCK_DGRAM:
        sock.listen(64)
    return sock


sockets = [named(word) for word in sys.argv[1:]]
sockets += [socket.socket(fileno=3 + number) for number in range(int(os.environ.get("LISTEN_FDS", 0)))]
threads = [
    threading.Thread(target=answer if sock.type == socket.SOCK_DGRAM else accept, args=(sock,)) for sock in sockets
]
for thread in threads:
    thread.start()
print("ready", flush=True)
