/* Preloaded library that shifts a program's wall clock by AMBIT_LAB_CLOCK seconds. The monotonic
 * clock, and so timers, are not shifted. It makes the system calls itself: an allocator may read the
 * time before libc is initialised. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t shift(void) {
  const char *seconds = getenv("AMBIT_LAB_CLOCK");
  return seconds ? strtol(seconds, NULL, 10) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = syscall(SYS_clock_gettime, clock, now);
  if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += shift();
  return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  (void)zone;
  int failed = syscall(SYS_gettimeofday, now, NULL);
  if (!failed) now->tv_sec += shift();
  return failed;
}

time_t time(time_t *result) {
  struct timespec now;
  if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
  if (result) *result = now.tv_sec;
  return now.tv_sec;
}
