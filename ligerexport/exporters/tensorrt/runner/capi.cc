#include "capi.h"

#include "session.h"

namespace {

thread_local std::string last_error;

// No exception may leave through C.
template <typename R, typename F>
R guarded(R otherwise, F&& work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return otherwise;
}

}  // namespace

struct liger_engine {
  std::shared_ptr<liger::Engine> engine;
  std::string described;
};

struct liger_session {
  std::shared_ptr<liger::Engine> engine;  // freed after the session
  liger::Session session;
  std::string described, profile;
};

#define LIGER_EXPORT extern "C" __attribute__((visibility("default")))

LIGER_EXPORT int liger_interface() { return LIGER_INTERFACE; }

LIGER_EXPORT const char* liger_error() { return last_error.c_str(); }

LIGER_EXPORT liger_engine* liger_engine_open(const char* artifact, const char* plugin, const char* precision, int batch,
                                             int flags) {
  return guarded<liger_engine*>(nullptr, [&] {
    liger::Options options;
    options.artifact = artifact;
    if (plugin != nullptr) options.plugin = plugin;
    if (precision != nullptr) options.precision = precision;
    options.batch = batch;
    options.build = flags & LIGER_BUILD;
    options.verbose = flags & LIGER_VERBOSE;
    auto engine = std::make_shared<liger::Engine>(options);
    std::string described = engine->Describe().dump();
    return new liger_engine{std::move(engine), std::move(described)};
  });
}

LIGER_EXPORT void liger_engine_close(liger_engine* engine) { delete engine; }

LIGER_EXPORT const char* liger_engine_describe(const liger_engine* engine) { return engine->described.c_str(); }

LIGER_EXPORT liger_session* liger_session_open(liger_engine* engine, int batch, int graph, int chunk) {
  return guarded<liger_session*>(nullptr, [&] {
    auto& shared = engine->engine;
    std::unique_ptr<liger_session> made(
        new liger_session{shared, {*shared, batch, graph != 0, chunk == 0 ? shared->Chunk(1) : chunk}, "", ""});
    made->described = made->session.Describe().dump();
    return made.release();
  });
}

LIGER_EXPORT void liger_session_close(liger_session* session) { delete session; }

LIGER_EXPORT const char* liger_session_describe(const liger_session* session) { return session->described.c_str(); }

LIGER_EXPORT int32_t* liger_session_position(liger_session* session) { return session->session.position().data(); }

LIGER_EXPORT int liger_session_advance(liger_session* session, const int32_t* ids, int tokens, float* logits) {
  return guarded(1, [&] {
    session->session.Advance(ids, tokens);
    if (logits != nullptr) session->session.Logits(logits);
    return 0;
  });
}

LIGER_EXPORT int liger_session_wait(liger_session* session) {
  return guarded(1, [&] { return session->session.Wait(), 0; });
}

LIGER_EXPORT int liger_session_reset(liger_session* session, int row) {
  return guarded(1, [&] { return session->session.Reset(row), 0; });
}

LIGER_EXPORT int liger_session_read(liger_session* session, int tensor, int row, void* to, size_t bytes) {
  return guarded(1, [&] { return session->session.Read(tensor, row, to, bytes), 0; });
}

LIGER_EXPORT int liger_session_write(liger_session* session, int tensor, int row, const void* from, size_t bytes) {
  return guarded(1, [&] { return session->session.Write(tensor, row, from, bytes), 0; });
}

LIGER_EXPORT int liger_session_time_step(liger_session* session, int graph, double* milliseconds) {
  return guarded(1, [&] { return *milliseconds = session->session.TimeStep(graph != 0), 0; });
}

LIGER_EXPORT const char* liger_session_profile(liger_session* session, int steps) {
  return guarded<const char*>(nullptr, [&] {
    session->profile = session->session.Profile(steps).dump();
    return session->profile.c_str();
  });
}

LIGER_EXPORT int liger_device_bytes(size_t* bytes) {
  return guarded(1, [&] {
    size_t available = 0, total = 0;
    liger::check(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
    return *bytes = total - available, 0;
  });
}
