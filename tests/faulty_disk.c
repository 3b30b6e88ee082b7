/* A disk that fails on demand: put before libc by LD_PRELOAD, it counts the calls that change what
 * lies below one folder, and lets one of them fail, or end the process.
 *
 * disk_arm(folder, at, fault): the call number `at`, from 1, sets errno to `fault` and changes
 * nothing; with fault -1 the process is killed there, as by SIGKILL. With at 0 all are only counted.
 * A full disk (ENOSPC) takes nothing away, so removing and opening what is there still works.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static long at, seen;
static int fault, armed;
static FILE *told;

void disk_arm(const char *folder, long which, int error, const char *log) {
    snprintf(below, sizeof below, "%s/", folder);
    at = which, seen = 0, fault = error, armed = 1;
    told = log ? fopen(log, "w") : NULL;
}

long disk_disarm(void) {
    armed = 0;
    if (told) fclose(told);
    told = NULL;
    return seen;
}

/* Whether the call `name` on `path` fails; makes room tells calls that a full disk refuses. */
static int fails(const char *name, const char *path, int makes_room) {
    if (!armed || strncmp(path, below, strlen(below))) return 0;
    if (fault == ENOSPC && !makes_room) return 0;
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (told) fprintf(told, "%s %s\n", name, path + strlen(below));
    if (number != at) return 0;
    if (fault < 0) kill(getpid(), SIGKILL);
    errno = fault;
    return 1;
}

static int fails_at(const char *name, int folder, const char *path, int makes_room) {
    char link[64], whole[2 * PATH_MAX] = "";
    if (!armed) return 0;
    if (path[0] != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(whole, PATH_MAX)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, whole, PATH_MAX);
            if (n < 0) return 0;
            whole[n] = 0;
        }
        strcat(whole, "/");
    }
    strncat(whole, path, PATH_MAX - 1);
    return fails(name, whole, makes_room);
}

static int fails_in(const char *name, int file, int makes_room) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails(name, path, makes_room);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        va_list rest;                                                     \
        va_start(rest, flags);                                            \
        mode_t mode = va_arg(rest, mode_t);                               \
        va_end(rest);                                                     \
        int changes = flags & (O_CREAT | O_TRUNC | (O_TMPFILE & ~O_DIRECTORY)); \
        if (changes && fails_at("open", AT_FDCWD, path, 1)) return -1;    \
        return REAL(name)(path, flags, mode);                             \
    }
#define OPENAT(name)                                                      \
    int name(int folder, const char *path, int flags, ...) {              \
        va_list rest;                                                     \
        va_start(rest, flags);                                            \
        mode_t mode = va_arg(rest, mode_t);                               \
        va_end(rest);                                                     \
        int changes = flags & (O_CREAT | O_TRUNC | (O_TMPFILE & ~O_DIRECTORY)); \
        if (changes && fails_at("open", folder, path, 1)) return -1;      \
        return REAL(name)(folder, path, flags, mode);                     \
    }
#define ON_FILE(type, name, ...)                                          \
    type name(int file, __VA_ARGS__) {                                    \
        if (fails_in(#name, file, 1)) return -1;                          \
        return REAL(name)(file, ARGUMENTS);                               \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define ARGUMENTS data, size
ON_FILE(ssize_t, write, const void *data, size_t size)
#undef ARGUMENTS
#define ARGUMENTS data, size, place
ON_FILE(ssize_t, pwrite, const void *data, size_t size, off_t place)
ON_FILE(ssize_t, pwrite64, const void *data, size_t size, off64_t place)
#undef ARGUMENTS
#define ARGUMENTS data, count
ON_FILE(ssize_t, writev, const struct iovec *data, int count)
#undef ARGUMENTS
#define ARGUMENTS size
ON_FILE(int, ftruncate, off_t size)
ON_FILE(int, ftruncate64, off64_t size)
#undef ARGUMENTS
#define ARGUMENTS source, place, size
ON_FILE(ssize_t, sendfile, int source, off_t *place, size_t size)
ON_FILE(ssize_t, sendfile64, int source, off64_t *place, size_t size)
#undef ARGUMENTS

int fsync(int file) { return fails_in("fsync", file, 1) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails_in("fdatasync", file, 1) ? -1 : REAL(fdatasync)(file); }

int mkdir(const char *path, mode_t mode) {
    return fails_at("mkdir", AT_FDCWD, path, 1) ? -1 : REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    return fails_at("mkdir", folder, path, 1) ? -1 : REAL(mkdirat)(folder, path, mode);
}
int rename(const char *old, const char *new) {
    return fails_at("rename", AT_FDCWD, new, 1) ? -1 : REAL(rename)(old, new);
}
int renameat(int from, const char *old, int to, const char *new) {
    return fails_at("rename", to, new, 1) ? -1 : REAL(renameat)(from, old, to, new);
}
int link(const char *old, const char *new) {
    return fails_at("link", AT_FDCWD, new, 1) ? -1 : REAL(link)(old, new);
}
int linkat(int from, const char *old, int to, const char *new, int flags) {
    return fails_at("link", to, new, 1) ? -1 : REAL(linkat)(from, old, to, new, flags);
}
int symlink(const char *target, const char *new) {
    return fails_at("symlink", AT_FDCWD, new, 1) ? -1 : REAL(symlink)(target, new);
}
int symlinkat(const char *target, int folder, const char *new) {
    return fails_at("symlink", folder, new, 1) ? -1 : REAL(symlinkat)(target, folder, new);
}
int unlink(const char *path) {
    return fails_at("unlink", AT_FDCWD, path, 0) ? -1 : REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    return fails_at("unlink", folder, path, 0) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    return fails_at("rmdir", AT_FDCWD, path, 0) ? -1 : REAL(rmdir)(path);
}
