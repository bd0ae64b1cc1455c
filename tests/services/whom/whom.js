// Answers with the address of its client: node whom.js PORT [WORKERS].
const cluster = require("cluster");
const [port, workers] = process.argv.slice(2).map(Number);
if (workers && (cluster.isPrimary ?? cluster.isMaster)) {
    for (let nth = 0; nth < workers; nth++) cluster.fork();
} else {
    require("http").createServer((request, response) => response.end(`${request.socket.remoteAddress}\n`)).listen(port);
}
