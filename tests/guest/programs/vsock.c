/* Sockets between guest and host: "listen PORT" echoes what one connection says, "connect PORT"
 * sends its input to the host and prints the answer. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static int copy(int from, int to)
{
	char data[65536];
	ssize_t length;

	while ((length = read(from, data, sizeof(data))) > 0)
		for (ssize_t done = 0; done < length;) {
			ssize_t part = write(to, data + done, length - done);

			if (part < 0)
				return 1;
			done += part;
		}
	return length < 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_vm address = { .svm_family = AF_VSOCK };
	int listens, made;

	if (argc != 3)
		return 2;
	listens = !strcmp(argv[1], "listen");
	address.svm_port = atoi(argv[2]);
	address.svm_cid = listens ? VMADDR_CID_ANY : VMADDR_CID_HOST;
	made = socket(AF_VSOCK, SOCK_STREAM, 0);
	if (listens) {
		if (bind(made, (void *)&address, sizeof(address)) || listen(made, 1))
			return perror("listen"), 1;
		made = accept(made, NULL, NULL);
		return copy(made, made);
	}
	if (connect(made, (void *)&address, sizeof(address)))
		return perror("connect"), 1;
	if (copy(0, made) || shutdown(made, SHUT_WR))
		return perror("send"), 1;
	return copy(made, 1);
}
