/* A file system that refuses what mounted buckets and drives refuse, for processes that run with LD_PRELOAD.

   Within the folder MOUNT: RENAME, RENAME_FOLDER, APPEND, FLOCK, FSYNC, SYMLINK and MAP hold the errno of the answer; MAP
   is for shared mappings, as FUSE answers for a mount with direct_io, and MAP_ANY for all. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_inside(const char *path) {
    const char *mount = getenv("MOUNT");
    return mount && strncmp(path, mount, strlen(mount)) == 0;
}

static int is_open_inside(int fd) {
    char link[64], path[PATH_MAX + 1];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX);
    if (length < 0) return 0;
    path[length] = 0;
    return is_inside(path);
}

static int refuses(const char *what) {
    const char *number = getenv(what);
    if (number) errno = atoi(number);
    return number != NULL;
}

static int is_folder(const char *path) {
    struct stat status;
    return lstat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

static int refuses_rename(const char *from) {
    return is_inside(from) && (refuses("RENAME") || (is_folder(from) && refuses("RENAME_FOLDER")));
}

int rename(const char *from, const char *to) {
    return refuses_rename(from) ? -1 : REAL("rename", int (*)(const char *, const char *))(from, to);
}

int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    if (refuses_rename(from)) return -1;
    return REAL("renameat", int (*)(int, const char *, int, const char *))(from_fd, from, to_fd, to);
}

static int open_with(const char *name, const char *path, int flags, mode_t mode) {
    if ((flags & O_APPEND) && is_inside(path) && refuses("APPEND")) return -1;
    return REAL(name, int (*)(const char *, int, ...))(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, int);
    va_end(rest);
    return open_with("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, int);
    va_end(rest);
    return open_with("open64", path, flags, mode);
}

int flock(int fd, int how) {
    return is_open_inside(fd) && refuses("FLOCK") ? -1 : REAL("flock", int (*)(int, int))(fd, how);
}

int fsync(int fd) {
    return is_open_inside(fd) && refuses("FSYNC") ? -1 : REAL("fsync", int (*)(int))(fd);
}

int symlink(const char *target, const char *path) {
    return is_inside(path) && refuses("SYMLINK") ? -1 : REAL("symlink", int (*)(const char *, const char *))(target, path);
}

static int refuses_map(int flags, int fd) {
    if (fd < 0 || !is_open_inside(fd)) return 0;
    return ((flags & MAP_SHARED) && refuses("MAP")) || refuses("MAP_ANY");
}

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    if (refuses_map(flags, fd)) return MAP_FAILED;
    return REAL("mmap", void *(*)(void *, size_t, int, int, int, off_t))(address, length, protection, flags, fd, offset);
}

void *mmap64(void *address, size_t length, int protection, int flags, int fd, off64_t offset) {
    if (refuses_map(flags, fd)) return MAP_FAILED;
    return REAL("mmap64", void *(*)(void *, size_t, int, int, int, off64_t))(
        address, length, protection, flags, fd, offset);
}
