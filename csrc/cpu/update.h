// The update of one page and sparse set after a token (docs/algorithm.md, section 3).
#pragma once

#include "cpu/update_interval.h"
#include "cpu/update_per_token.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// What an update needs: of the two ways, the one that a layer's pages are laid out for.
template <typename T>
struct UpdateWorkspace {
  IntervalUpdate<T> interval;
  PerTokenUpdate<T> per_token;

  UpdateWorkspace(const PageLayout& layout, Workspace& memory) {
    if (layout.keeps_bounds()) {
      per_token = PerTokenUpdate<T>(layout, memory);
    } else {
      interval = IntervalUpdate<T>(layout, false, memory);
    }
  }
};

// An update that knows of those before only what the page holds.
template <typename T>
void update(const Call& call, const UpdatePoint& at, UpdateWorkspace<T>& x,
            Prefetcher* prefetcher) {
  if (call.layout.keeps_bounds()) return update_per_token(call, at, x.per_token, prefetcher);
  x.interval.features.known = 0;
  decide_update(call, at, x.interval);
  commit_update(at, x.interval);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
