// An echo of lines, and for "give" a megabyte, with a time-out and a question before each read: Reader.ready() is FIONREAD.
import java.io.*;
import java.net.*;

public class Lines {
    public static void main(String[] arguments) throws IOException {
        ServerSocket listener = new ServerSocket(Integer.parseInt(arguments[0]), 50, InetAddress.getByName("127.0.0.1"));
        while (true) {
            Socket client = listener.accept();
            new Thread(() -> serve(client)).start();
        }
    }

    static void serve(Socket client) {
        byte[] megabyte = new byte[1 << 20];
        try (client) {
            client.setSoTimeout(5000);
            BufferedReader reader = new BufferedReader(new InputStreamReader(client.getInputStream()));
            OutputStream writer = client.getOutputStream();
            for (long quiet = System.nanoTime(); System.nanoTime() - quiet < 5_000_000_000L; ) {
                if (!reader.ready()) {
                    Thread.sleep(1);
                    continue;
                }
                String line = reader.readLine();
                writer.write(line.equals("give") ? megabyte : (line + "\n").getBytes());
                quiet = System.nanoTime();
            }
        } catch (IOException | InterruptedException ended) {
        }
    }
}
