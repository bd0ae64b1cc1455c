# Does in the machine what the test outside wants, as root or as an ordinary user, in that user's session. A request is one JSON
# object a line on standard input, which is a virtio-serial port as standard output is; its answer has the same "id", and comes when
# it is done, whatever else is going on. The first line says which boot of the machine this is.
#
#   {"run": ["systemctl", "start", ...], "seconds": 60}     {"code": 0, "stdout": "", "stderr": ""}
#   {"connect": PORT}                                       {"client": 3}
#   {"send": CLIENT, "text": "", "end": false}              {}, with end the client half-closes
#   {"receive": CLIENT, "bytes": 4}                         {"text": ""}, to the end without "bytes"
#   {"close": CLIENT}                                       {}
#   {"echo": PORT, "bytes": 1000000}                        {}, when each of them came back
#
# An answer with "error" says why there is no other.
import itertools, json, os, signal, socket, subprocess, sys, tempfile, threading

PATIENCE = 110
out, lock = sys.stdout.buffer, threading.Lock()
clients, numbers = {}, itertools.count(1)


def say(answer):
    with lock:
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


def run(request):
    # Files, not pipes: who reads a pipe to its end waits for all that the command has started.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        command = subprocess.Popen(
            request["run"], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            code = command.wait(request["seconds"])
        except subprocess.TimeoutExpired:
            os.killpg(command.pid, signal.SIGKILL)
            code = command.wait()
            stderr.write(f"killed after {request['seconds']} s".encode())
        texts = []
        for file in stdout, stderr:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return {"code": code if code >= 0 else 128 - code, "stdout": texts[0], "stderr": texts[1]}


def connect(request):
    client = next(numbers)
    clients[client] = socket.create_connection(("127.0.0.1", request["connect"]), PATIENCE)
    return {"client": client}


def send(request):
    client = clients[request["send"]]
    client.sendall(request["text"].encode())
    if request["end"]:
        client.shutdown(socket.SHUT_WR)
    return {}


def receive(request):
    client, wanted, got = clients[request["receive"]], request.get("bytes"), b""
    while wanted is None or len(got) < wanted:
        some = client.recv(65536 if wanted is None else wanted - len(got))
        if not some:
            break
        got += some
    return {"text": got.decode(errors="replace")}


def close(request):
    clients.pop(request["close"]).close()
    return {}


def echo(request):
    sent = os.urandom(request["bytes"])
    with socket.create_connection(("127.0.0.1", request["echo"]), PATIENCE) as client:

        def write():
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        # Beside the reading: more than the sockets hold would block both.
        writer = threading.Thread(target=write)
        writer.start()
        got = bytearray()
        while some := client.recv(65536):
            got += some
        writer.join()
    if got != sent:
        raise ValueError(f"{len(sent)} bytes were sent, {len(got)} came back")
    return {}


def answer(request):
    try:
        does = next(does for does in (run, connect, send, receive, close, echo) if does.__name__ in request)
        result = does(request)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    say({"id": request["id"], **result})


with open("/proc/sys/kernel/random/boot_id") as file:
    say({"boot": file.read().strip()})
for line in sys.stdin.buffer:
    threading.Thread(target=answer, args=[json.loads(line)], daemon=True).start()
