// The system's permission to use the tiles of AMX, which a process has to ask for.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vimamba {

inline bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return may;
#else
  return false;
#endif
}

}  // namespace vimamba
