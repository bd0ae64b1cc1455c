// An echo of lines, and for "give" a megabyte: Go's sockets are non-blocking, and its runtime polls them.
package main

import (
	"bufio"
	"net"
	"os"
)

func serve(client net.Conn) {
	defer client.Close()
	reader := bufio.NewReader(client)
	for {
		line, err := reader.ReadBytes('\n')
		if err != nil {
			return
		}
		if string(line) == "give\n" {
			line = make([]byte, 1<<20)
		}
		if _, err = client.Write(line); err != nil {
			return
		}
	}
}

func main() {
	listener, err := net.Listen("tcp4", "127.0.0.1:"+os.Args[1])
	if err != nil {
		panic(err)
	}
	for {
		client, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		go serve(client)
	}
}
