// An echo of lines, and for "give" a megabyte, in Node.
require("net").createServer({ allowHalfOpen: true }, socket => {
    let rest = "";
    socket.on("data", data => {
        const lines = (rest + data).split("\n");
        rest = lines.pop();
        for (const line of lines) socket.write(line === "give" ? "x".repeat(1 << 20) : line + "\n");
    });
    socket.on("end", () => socket.end());
    socket.on("error", () => {});
}).listen(Number(process.argv[2]), "127.0.0.1");
