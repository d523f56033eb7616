// Reads a prompt, and keeps the state after its beginning in a file for the next prompt that begins in the same way.
#pragma once

#include <filesystem>
#include <vector>

#include "session.h"

// Advances a session that has seen nothing by a prompt. The file is the one of the package's --prompt-cache.
const std::vector<float>& read_prompt(Session& session, const std::vector<int64_t>& ids,
                                      const std::filesystem::path& cache);
