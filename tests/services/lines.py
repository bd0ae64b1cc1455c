# An echo of lines, and for "give" a megabyte, as most people write it in asyncio: its sockets are non-blocking, and it is woken by
# epoll.
import asyncio, sys
async def serve(reader, writer):
    while line := await reader.readline():
        writer.write(b"x" * (1 << 20) if line == b"give\n" else line)
        await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()
asyncio.run(main())
