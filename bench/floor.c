/* The floor under every runner: keep WIDTH children of a program in flight, and do nothing else.
 *
 *     floor COUNT WIDTH PROGRAM [ARGUMENT...]
 *
 * Prints the seconds from before the first posix_spawn to after the last wait. Exits 1 when a child
 * could not be started or did not end with 0: then no figure may be used.
 */

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>

extern char **environ;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    if (argc < 4) {
        fprintf(stderr, "usage: floor COUNT WIDTH PROGRAM [ARGUMENT...]\n");
        return 2;
    }
    long left = atol(argv[1]), width = atol(argv[2]), running = 0, failed = 0;
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    for (int fd = 0; fd < 3; fd++)
        posix_spawn_file_actions_addopen(&files, fd, "/dev/null", O_RDWR, 0);

    double began = now();
    while (left > 0 || running > 0) {
        while (left > 0 && running < width) {
            pid_t pid;
            int error = posix_spawnp(&pid, argv[3], &files, NULL, argv + 3, environ);
            if (error != 0) {
                fprintf(stderr, "floor: %s: %s\n", argv[3], strerror(error));
                return 1;
            }
            left--;
            running++;
        }
        int status;
        if (wait(&status) < 0) {
            if (errno == EINTR)
                continue;
            perror("floor: wait");
            return 1;
        }
        running--;
        failed += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    }
    double seconds = now() - began;
    if (failed > 0) {
        fprintf(stderr, "floor: %ld of %s children did not end with 0\n", failed, argv[1]);
        return 1;
    }
    printf("%.6f\n", seconds);
    return 0;
}
