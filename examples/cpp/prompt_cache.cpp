#include "prompt_cache.h"

#include <algorithm>
#include <stdexcept>

namespace {

constexpr size_t kWorth = 32;  // tokens for which a file is worthwhile

}  // namespace

const std::vector<float>& read_prompt(Session& session, const std::vector<int64_t>& ids,
                                      const std::filesystem::path& cache) {
  if (ids.size() < 2) return session.advance(ids);
  const size_t last = ids.size() - 1;  // a state does not include the logits after the last token
  size_t shared = 0;
  if (std::filesystem::exists(cache)) {
    const SavedIds saved = read_ids(cache);
    if (saved.ids.empty())
      throw std::runtime_error(cache.string() + " is a saved state, not a prompt cache: choose another file");
    if (saved.model == session.manifest().value("fingerprint", "")) {
      const auto end = std::mismatch(saved.ids.begin(), saved.ids.end(), ids.begin(), ids.begin() + last).first;
      shared = end - saved.ids.begin();
      if (end == saved.ids.end()) {
        session.restore(cache);
        return session.advance({ids.begin() + shared, ids.end()});
      }
    }
  }
  const size_t keep = shared >= kWorth ? shared : last;
  if (keep < kWorth) return session.advance(ids);
  const std::vector<int64_t> beginning(ids.begin(), ids.begin() + keep);
  session.advance(beginning);
  session.save(cache, beginning);
  return session.advance({ids.begin() + keep, ids.end()});
}
