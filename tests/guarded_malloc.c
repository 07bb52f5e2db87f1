// Preloaded, it surrounds all aligned memory (that of tensors and of oneDNN) with guard bytes, and fills it with NaNs.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BUCKETS = 4096, FRONT = 1 << 12, BACK = 1 << 16, FILL = 0xFF };   // guard bytes before and behind; 0xFFFF is a NaN
typedef struct block { struct block *next; unsigned char *at, *base; size_t size; long age; } block;
extern void *__libc_malloc(size_t), *__libc_memalign(size_t, size_t), *__libc_realloc(void *, size_t);
extern void __libc_free(void *);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static block *table[BUCKETS];
static long now, found, farthest;   // how often `begin` was called; blocks with changed guard bytes, and how many bytes away the farthest was (negative: before)

static block **bucket(void *p) { return &table[((uintptr_t)p >> 6) % BUCKETS]; }

static void check(block *b) {
    unsigned char *front = b->at - FRONT, *back = b->at + b->size;
    long far = 0;
    for (long i = 0; i < FRONT && !far; i++) if (front[i] != FILL) far = i - FRONT;
    if (back[0] != FILL || memcmp(back, back + 1, BACK - 1)) for (long i = 0; i < BACK; i++) if (back[i] != FILL) far = i + 1;
    if (!far) return;
    found++;
    if (labs(far) > labs(farthest)) farthest = far;
    memset(front, FILL, FRONT);
    memset(back, FILL, BACK);
}

// From here on, `overruns` looks at blocks made later, and at those that are given back.
void begin(void) { now++; }

// How many blocks were written outside of since the last call.
long overruns(long *far) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < BUCKETS; i++) for (block *b = table[i]; b; b = b->next) if (b->age == now) check(b);
    long n = found;
    *far = farthest;
    found = farthest = 0;
    pthread_mutex_unlock(&lock);
    return n;
}

void *memalign(size_t align, size_t size) {
    size_t front = align > FRONT ? align : FRONT;
    unsigned char *base = __libc_memalign(align, front + size + BACK);
    block *b = __libc_malloc(sizeof *b);
    if (!base || !b) return __libc_free(base), __libc_free(b), NULL;
    *b = (block){NULL, base + front, base, size, now};
    memset(b->at - FRONT, FILL, FRONT + size + BACK);
    pthread_mutex_lock(&lock);
    b->next = *bucket(b->at);
    *bucket(b->at) = b;
    pthread_mutex_unlock(&lock);
    return b->at;
}
int posix_memalign(void **p, size_t align, size_t size) { return (*p = memalign(align, size)) ? 0 : ENOMEM; }
void *aligned_alloc(size_t align, size_t size) { return memalign(align, size); }

static block *take(void *p) {
    pthread_mutex_lock(&lock);
    block **at = bucket(p), *b;
    while ((b = *at) && b->at != p) at = &b->next;
    if (b) { *at = b->next; check(b); }
    pthread_mutex_unlock(&lock);
    return b;
}

void free(void *p) {
    block *b = p ? take(p) : NULL;
    if (!b) { __libc_free(p); return; }
    memset(b->at, FILL, b->size);   // whoever reads it still finds NaNs
    __libc_free(b->base);
    __libc_free(b);
}

void *realloc(void *p, size_t size) {
    block *b = p ? take(p) : NULL;
    if (!b) return __libc_realloc(p, size);
    void *moved = __libc_malloc(size);
    if (moved) memcpy(moved, p, size < b->size ? size : b->size);
    __libc_free(b->base);
    __libc_free(b);
    return moved;
}

size_t malloc_usable_size(void *p) {
    if (!p) return 0;
    pthread_mutex_lock(&lock);
    block *b = *bucket(p);
    while (b && b->at != p) b = b->next;
    pthread_mutex_unlock(&lock);
    return b ? b->size : ((size_t (*)(void *))dlsym(RTLD_NEXT, "malloc_usable_size"))(p);
}
