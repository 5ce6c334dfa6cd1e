//! The table of paths: which requests get a prefill leg, which go to every server, which are the
//! proxy's own. A path that is not in the table is passed to a decode server: nothing is a 404 of
//! the proxy.

use hyper::Method;

/// A way to ask for generated tokens; each names its prompt and its limits differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/responses`.
    Responses,
    /// `/v1/messages`, Anthropic's form.
    Messages,
    /// `/inference/v1/generate`: token ids in, token ids out.
    Tokens,
}

/// What the proxy does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// A prefill leg, then decode.
    Generate(Generation),
    /// To one decode server (or worker), body and all.
    Pass,
    /// Reads or cancels a stored response: only the server that made it knows it.
    StoredResponse,
    /// Changes the state of a server: must reach every one.
    Everywhere,
    /// `/healthcheck`: mode and counts, as the first proxy of this name answered.
    Healthcheck,
    /// `/health`: 200 while requests can be served.
    Health,
    /// `/metrics`: the proxy's own, or with `?instance=` those of one server.
    Metrics,
}

/// Profilers, adapters and cache resets: half of the servers changed would be worse than none.
const EVERYWHERE: [&str; 12] = [
    "/start_profile",
    "/stop_profile",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/reset_encoder_cache",
    "/sleep",
    "/wake_up",
    "/pause",
    "/resume",
    "/abort_requests",
];

impl Route {
    /// Looks a request up.
    pub fn of(method: &Method, path: &str) -> Self {
        let path = if path.len() > 1 { path.trim_end_matches('/') } else { path };
        let generation = match path {
            "/v1/completions" => Some(Generation::Completions),
            "/v1/chat/completions" => Some(Generation::Chat),
            "/v1/responses" => Some(Generation::Responses),
            "/v1/messages" => Some(Generation::Messages),
            "/inference/v1/generate" => Some(Generation::Tokens),
            _ => None,
        };
        match (generation, path) {
            (Some(generation), _) if method == Method::POST => Self::Generate(generation),
            (_, "/healthcheck") => Self::Healthcheck,
            (_, "/health") => Self::Health,
            (_, "/metrics") => Self::Metrics,
            _ if method == Method::POST && EVERYWHERE.contains(&path) => Self::Everywhere,
            _ if path.starts_with("/v1/responses/") && path != "/v1/responses/render" => {
                Self::StoredResponse
            }
            _ => Self::Pass,
        }
    }

    /// A bounded set of names for logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Generate(generation) => generation.path(),
            Self::Pass => "other",
            Self::StoredResponse => "/v1/responses/{id}",
            Self::Everywhere => "everywhere",
            Self::Healthcheck => "/healthcheck",
            Self::Health => "/health",
            Self::Metrics => "/metrics",
        }
    }
}

impl Generation {
    /// The path as servers know it.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
            Self::Tokens => "/inference/v1/generate",
        }
    }

    /// Whether a whole stream ends with `data: [DONE]`.
    pub fn ends_with_done(self) -> bool {
        matches!(self, Self::Completions | Self::Chat | Self::Tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_a_way() {
        // Goal: generation only for POST, stored responses apart, the unknown passed on.
        let of = Route::of;
        assert_eq!(of(&Method::POST, "/v1/chat/completions"), Route::Generate(Generation::Chat));
        assert_eq!(of(&Method::GET, "/v1/chat/completions"), Route::Pass);
        assert_eq!(of(&Method::GET, "/v1/responses/resp_1"), Route::StoredResponse);
        assert_eq!(of(&Method::POST, "/v1/responses/render"), Route::Pass);
        assert_eq!(of(&Method::POST, "/start_profile"), Route::Everywhere);
        for path in ["/v1/embeddings", "/pooling", "/v1/models", "/tokenize", "/version", "/x/y"] {
            assert_eq!(of(&Method::POST, path), Route::Pass, "{path}");
        }
    }
}
