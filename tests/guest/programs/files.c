/* Exercise a file system: files DIRECTORY SEED. Prints "ok", or what went wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define SIZE (256 * 1024)
#define STEPS 300

#define CHECK(what)                                                        \
    do {                                                                   \
        if (!(what)) {                                                     \
            printf("line %d: %s: %s\n", __LINE__, #what, strerror(errno)); \
            exit(1);                                                       \
        }                                                                  \
    } while (0)

static unsigned char image[SIZE], data[SIZE];

static void random_access(const char *path)
{
    size_t length = 0;
    int file = open(path, O_RDWR | O_CREAT | O_EXCL, 0644);
    CHECK(file >= 0);
    for (int step = 0; step < STEPS; step++) {
        size_t at = rand() % SIZE, size = rand() % (SIZE - at) % 70000 + 1;
        switch (rand() % 8) {
        case 0: /* another length: what lies beyond is zero when it grows again */
            CHECK(ftruncate(file, at) == 0);
            if (at < length)
                memset(image + at, 0, length - at);
            length = at;
            break;
        case 1: case 2: case 3:
            for (size_t n = 0; n < size; n++)
                image[at + n] = rand();
            CHECK(pwrite(file, image + at, size, at) == (ssize_t)size);
            if (length < at + size)
                length = at + size;
            break;
        case 4:
            CHECK(fsync(file) == 0);
            break;
        case 5:
            CHECK(close(file) == 0);
            file = open(path, O_RDWR);
            CHECK(file >= 0);
            break;
        default: {
            size_t expected = at >= length ? 0 : length - at < size ? length - at : size;
            CHECK(pread(file, data, size, at) == (ssize_t)expected);
            CHECK(memcmp(data, image + at, expected) == 0);
        }
        }
        struct stat status;
        CHECK(fstat(file, &status) == 0);
        CHECK((size_t)status.st_size == length);
    }
    CHECK(ftruncate(file, SIZE) == 0);
    unsigned char *mapped = mmap(NULL, SIZE, PROT_READ, MAP_PRIVATE, file, 0);
    CHECK(mapped != MAP_FAILED);
    CHECK(memcmp(mapped, image, SIZE) == 0);
    CHECK(close(file) == 0);
}

static void without_a_name(void)
{
    struct stat status;
    int file = open("gone", O_RDWR | O_CREAT, 0600);
    CHECK(file >= 0);
    CHECK(unlink("gone") == 0);
    CHECK(access("gone", F_OK) < 0 && errno == ENOENT);
    CHECK(write(file, "still here", 10) == 10);
    CHECK(pread(file, data, 100, 0) == 10 && memcmp(data, "still here", 10) == 0);
    CHECK(fstat(file, &status) == 0 && status.st_size == 10);
    CHECK(close(file) == 0);
}

static void locks(void)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 10};
    int file = open("locked", O_RDWR | O_CREAT, 0600);
    CHECK(file >= 0);
    CHECK(flock(file, LOCK_EX | LOCK_NB) == 0);
    int second = open("locked", O_RDWR);
    CHECK(second >= 0);
    CHECK(flock(second, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK);
    CHECK(flock(file, LOCK_UN) == 0);
    CHECK(fcntl(second, F_SETLK, &lock) == 0);
    CHECK(close(file) == 0 && close(second) == 0);
}

int main(int argc, char **argv)
{
    CHECK(argc == 3 && chdir(argv[1]) == 0);
    srand(atoi(argv[2]));
    random_access("random");
    without_a_name();
    locks();
    puts("ok");
    return 0;
}
