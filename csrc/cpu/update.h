// The update of one page and sparse set after a token (docs/algorithm.md, section 3).
#pragma once

#include "cpu/update_bounded.h"
#include "cpu/update_exact.h"

LOLA_BEGIN_TARGET();
namespace lola {
namespace LOLA_ISA {
namespace {

// What an update needs: of the two ways, the one that a layer's pages are laid out for.
template <typename T>
struct UpdateWorkspace {
  ExactUpdate<T> exact;
  BoundedUpdate<T> bounded;

  UpdateWorkspace(const PageLayout& layout, Workspace& memory) {
    if (layout.bounded()) {
      bounded = BoundedUpdate<T>(layout, memory);
    } else {
      exact = ExactUpdate<T>(layout, false, memory);
    }
  }
};

// An update that knows of those before only what the page holds.
template <typename T>
void update(const Call& call, const UpdatePoint& at, UpdateWorkspace<T>& x,
            Prefetcher* prefetcher) {
  if (call.layout.bounded()) return update_bounded(call, at, x.bounded, prefetcher);
  x.exact.features.known = 0;
  decide_update(call, at, x.exact);
  commit_update(at, x.exact);
}

}  // namespace
}  // namespace LOLA_ISA
}  // namespace lola
LOLA_END_TARGET();
