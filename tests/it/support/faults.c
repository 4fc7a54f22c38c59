// Makes calls to the system fail as a failing disk does, while a file says so. Loaded before the C library (LD_PRELOAD).
// FAULTS names a folder: with `sync` in it no file of the write-ahead log can be synced, with `write` none can be written to,
// with `full` nothing can be written to any file below FAULTS_UNDER.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int is_set(const char *name) {
    const char *folder = getenv("FAULTS");
    char path[PATH_MAX];
    if (!folder) return 0;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int before = errno;
    int found = access(path, F_OK) == 0;
    errno = before;
    return found;
}

// The file behind a descriptor, if it is below FAULTS_UNDER.
static int is_file(int fd, const char *ending) {
    const char *under = getenv("FAULTS_UNDER");
    char link[64], path[PATH_MAX];
    if (!under) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    size_t end = strlen(ending);
    return strncmp(path, under, strlen(under)) == 0 && (size_t)length >= end && strcmp(path + length - end, ending) == 0;
}

static int write_fails(int fd) {
    if (is_set("full") && is_file(fd, "")) { errno = ENOSPC; return 1; }
    if (is_set("write") && is_file(fd, ".log")) { errno = EIO; return 1; }
    return 0;
}

static int sync_fails(int fd) {
    if (is_set("sync") && is_file(fd, ".log")) { errno = EIO; return 1; }
    return 0;
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

int fdatasync(int fd) {
    return sync_fails(fd) ? -1 : REAL("fdatasync", int (*)(int))(fd);
}

int fsync(int fd) {
    return sync_fails(fd) ? -1 : REAL("fsync", int (*)(int))(fd);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    return write_fails(fd) ? -1 : REAL("write", ssize_t (*)(int, const void *, size_t))(fd, bytes, count);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at) {
    return write_fails(fd) ? -1 : REAL("pwrite", ssize_t (*)(int, const void *, size_t, off_t))(fd, bytes, count, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) {
    return write_fails(fd) ? -1 : REAL("pwrite64", ssize_t (*)(int, const void *, size_t, off64_t))(fd, bytes, count, at);
}
