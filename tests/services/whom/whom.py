# Answers with the address of its client: by asyncio (python3 whom.py PORT), by WSGI and by ASGI. By asyncio it ends when it is asked for /end.
import asyncio, os, sys


def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["REMOTE_ADDR"].encode()]


async def asgi(scope, receive, send):
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["client"][0].encode()})


async def serve(reader, writer):
    request = await reader.readuntil(b"\r\n\r\n")
    if request.startswith(b"GET /end "):
        os._exit(0)
    address = writer.get_extra_info("peername")[0]
    writer.write(f"HTTP/1.0 200 OK\r\nContent-Length: {len(address)}\r\n\r\n{address}".encode())
    await writer.drain()
    writer.close()


async def main(port):
    await (await asyncio.start_server(serve, "0.0.0.0", port)).serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
