# Answers each client after a moment, one after the other, and ends at once when it is told to: python3 slow.py PORT SECONDS.
import signal, socket, sys, time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    client, _ = listener.accept()
    time.sleep(float(sys.argv[2]))
    client.sendall(b"answer")
    client.close()
