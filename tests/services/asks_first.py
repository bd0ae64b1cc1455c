# An echo of lines, and for "give" a megabyte, that asks FIONREAD before each read of a socket that does not block.
import fcntl, socket, struct, sys, termios, threading, time
def ready(fd):
    return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"    "))[0]
def serve(connection):
    connection.setblocking(False)
    rest, quiet = b"", time.monotonic()
    while time.monotonic() - quiet < 5:
        count = ready(connection.fileno())
        if not count:
            time.sleep(0.0005)
            continue
        rest, quiet = rest + connection.recv(count), time.monotonic()
        *lines, rest = rest.split(b"\n")
        for line in lines:
            connection.setblocking(True)
            connection.sendall(b"x" * (1 << 20) if line == b"give" else line + b"\n")
            connection.setblocking(False)
    connection.close()
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
