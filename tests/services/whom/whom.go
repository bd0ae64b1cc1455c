// Answers with the address of its client: whom PORT.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
)

func main() {
	answer := func(writer http.ResponseWriter, request *http.Request) {
		address, _, _ := net.SplitHostPort(request.RemoteAddr)
		fmt.Fprint(writer, address)
	}
	panic(http.ListenAndServe(":"+os.Args[1], http.HandlerFunc(answer)))
}
