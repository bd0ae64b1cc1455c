// Answers with the address of its client: java Whom.java httpserver|nio PORT.
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.*;
import java.util.Iterator;

public class Whom {
    public static void main(String[] arguments) throws Exception {
        InetSocketAddress place = new InetSocketAddress(Integer.parseInt(arguments[1]));
        if (arguments[0].equals("nio")) nio(place);
        HttpServer server = HttpServer.create(place, 50);
        server.createContext("/", exchange -> {
            byte[] address = exchange.getRemoteAddress().getAddress().getHostAddress().getBytes();
            exchange.sendResponseHeaders(200, address.length);
            exchange.getResponseBody().write(address);
            exchange.close();
        });
        server.start();
    }

    // The channel is registered before it is bound.
    static void nio(InetSocketAddress place) throws Exception {
        Selector selector = Selector.open();
        ServerSocketChannel listener = ServerSocketChannel.open();
        listener.configureBlocking(false);
        listener.register(selector, SelectionKey.OP_ACCEPT);
        listener.bind(place, 50);
        while (true) {
            selector.select();
            for (Iterator<SelectionKey> keys = selector.selectedKeys().iterator(); keys.hasNext(); keys.remove()) {
                SelectionKey key = keys.next();
                if (key.isValid() && key.isAcceptable()) {
                    SocketChannel client = listener.accept();
                    if (client == null) continue;
                    client.configureBlocking(false);
                    client.register(selector, SelectionKey.OP_READ);
                } else if (key.isValid() && key.isReadable()) {
                    SocketChannel client = (SocketChannel) key.channel();
                    client.read(ByteBuffer.allocate(4096));
                    String address = ((InetSocketAddress) client.getRemoteAddress()).getAddress().getHostAddress();
                    client.write(ByteBuffer.wrap(("HTTP/1.0 200 OK\r\n\r\n" + address).getBytes()));
                    client.close();
                }
            }
        }
    }
}
