# The service behind most forwarders of this suite: python3 service.py PORT [DELAY [BACKLOG]]
# It listens on 127.0.0.1:PORT after DELAY seconds. A client that sends `who` and ends learns which run of the service answers
# and when it began to listen (CLOCK_MONOTONIC, nanoseconds); to everybody else it echoes. The same over UDP, a datagram each.
import asyncio, signal, sys, time, uuid

port, delay = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as PID 1 of a container it would be ignored
time.sleep(delay)
run, listening = uuid.uuid4().hex, 0


async def serve(reader, writer):
    try:
        data = await reader.read(65536)
        if data == b"who":
            writer.write(f"{run} {listening}".encode())
        else:
            while data:
                writer.write(data)
                await writer.drain()
                data = await reader.read(65536)
        writer.close()
        await writer.wait_closed()
    except ConnectionError:
        pass


class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, client):
        self.transport.sendto(f"{run} {listening}".encode() if data == b"who" else data, client)


async def main():
    global listening
    await asyncio.get_running_loop().create_datagram_endpoint(Datagrams, ("127.0.0.1", port))
    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024, start_serving=False)
    listening = time.monotonic_ns()
    await server.start_serving()
    await server.serve_forever()


asyncio.run(main())
