//! Which headers travel. Owns the rules for hop-by-hop headers, credentials and request ids; does
//! not know bodies.

use hyper::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE,
    EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};

/// The id that the client, the proxy and both servers call a request by.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Anthropic clients' credentials.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Headers that belong to one connection (RFC 9110, 7.6.1) or that the proxy sets itself.
const HOP_BY_HOP: [HeaderName; 11] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-authenticate"),
    HeaderName::from_static("proxy-authorization"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    HOST,
    EXPECT,
];

/// Takes out what ends at this hop, also what `Connection` names.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let listed: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .collect();
        for name in listed {
            headers.remove(name);
        }
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// The client's headers as the servers get them, without the body's length, which follows from the
/// body that is sent. Returns the request's id beside them.
pub fn toward_servers(client: &HeaderMap, key: Option<&HeaderValue>) -> (HeaderMap, HeaderValue) {
    let mut headers = client.clone();
    strip_hop_by_hop(&mut headers);
    headers.remove(CONTENT_LENGTH);
    let has_credentials = headers.contains_key(AUTHORIZATION) || headers.contains_key(X_API_KEY);
    if let (false, Some(key)) = (has_credentials, key) {
        headers.insert(AUTHORIZATION, key.clone());
    }
    let id = match headers.get(X_REQUEST_ID) {
        Some(id) if !id.is_empty() => id.clone(),
        _ => fresh_id(),
    };
    headers.insert(X_REQUEST_ID, id.clone());
    (headers, id)
}

/// Headers of a prefill leg: its body is our own JSON, and its answer is read here, so it must not
/// come compressed. With several legs each gets an id of its own, since servers name requests by it.
pub fn for_leg(headers: &HeaderMap, leg: usize) -> HeaderMap {
    let mut headers = headers.clone();
    for name in [CONTENT_ENCODING, ACCEPT_ENCODING] {
        headers.remove(name);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if leg > 0 {
        let base = headers.get(X_REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default();
        if let Ok(id) = HeaderValue::from_str(&format!("{base}-{leg}")) {
            headers.insert(X_REQUEST_ID, id);
        }
    }
    headers
}

/// Makes the headers of a server's answer those of ours.
pub fn toward_client(headers: &mut HeaderMap, id: &HeaderValue) {
    strip_hop_by_hop(headers);
    if !headers.contains_key(X_REQUEST_ID) {
        headers.insert(X_REQUEST_ID, id.clone());
    }
}

/// `Bearer KEY` from the environment, for clients that bring no credentials.
pub fn key_from_environment() -> Option<HeaderValue> {
    let key = std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.trim().is_empty())?;
    let mut value = HeaderValue::from_str(&format!("Bearer {}", key.trim())).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Whether a content type names JSON; no content type at all may be JSON too.
pub fn may_be_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE) else { return true };
    value.to_str().is_ok_and(|text| text.to_ascii_lowercase().contains("json"))
}

/// Whether an answer is one JSON value, not lines of them.
pub fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = value.and_then(|text| text.split(';').next()).unwrap_or_default();
    kind.trim().eq_ignore_ascii_case("application/json")
}

/// Whether an answer is a stream of server-sent events.
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    value
        .is_some_and(|text| text.trim_start().to_ascii_lowercase().starts_with("text/event-stream"))
}

fn fresh_id() -> HeaderValue {
    let text = format!("{:032x}", fastrand::u128(..));
    HeaderValue::from_str(&text).expect("hexadecimal digits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_and_ids_are_the_clients_where_it_has_them() {
        // Goal: the key of the environment never replaces one; ids are kept or made.
        let key = HeaderValue::from_static("Bearer env");
        let mut client = HeaderMap::new();
        let (made, id) = toward_servers(&client, Some(&key));
        assert_eq!((&made[AUTHORIZATION], &made[X_REQUEST_ID]), (&key, &id));
        assert_eq!(id.len(), 32);
        client.insert(AUTHORIZATION, HeaderValue::from_static("Bearer mine"));
        client.insert(X_REQUEST_ID, HeaderValue::from_static("abc"));
        let (kept, id) = toward_servers(&client, Some(&key));
        assert_eq!((&kept[AUTHORIZATION], &id), (&client[AUTHORIZATION], &client[X_REQUEST_ID]));
        assert_eq!(for_leg(&kept, 2)[X_REQUEST_ID], "abc-2");
        let mut anthropic = HeaderMap::new();
        anthropic.insert(X_API_KEY, HeaderValue::from_static("k"));
        assert!(!toward_servers(&anthropic, Some(&key)).0.contains_key(AUTHORIZATION));
    }

    #[test]
    fn headers_of_one_connection_end_here() {
        // Goal: what `Connection` names goes too; tracing headers stay.
        let mut headers = HeaderMap::new();
        for (name, value) in [("connection", "close, X-Hop"), ("x-hop", "1"), ("te", "trailers")] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers.insert("traceparent", HeaderValue::from_static("00-1-2-01"));
        strip_hop_by_hop(&mut headers);
        assert_eq!(headers.len(), 1);
        assert!(headers.contains_key("traceparent"));
    }
}
