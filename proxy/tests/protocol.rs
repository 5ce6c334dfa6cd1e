//! What travels: legs, decode's request, answers, headers, every endpoint. Against servers that
//! behave.
#![allow(missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

mod common;

use std::time::Duration;

use common::client::{self, get, post, post_text};
use common::proxy::{Proxy, servers};
use common::scripted::{Script, Seen, Server, bytes, wait};
use common::{block_on, eventually};
use serde_json::{Value, json};

const DONE: &str = "data: [DONE]\n\n";

/// A prefill server with the connector.
fn prefills(seen: &Seen) -> Script {
    if seen.method == "GET" {
        return Script::json(404, &json!({"detail": "Not Found"}));
    }
    let announced = json!({"version": 1, "tokens": 128, "last_block_id": "ab", "writer": "w"});
    Script::json(
        200,
        &json!({"id": "p", "choices": [], "usage": {"prompt_tokens": 130},
        "kv_transfer_params": {"ucm": announced}}),
    )
}

/// A decode server: one answer or a stream.
fn decodes(seen: &Seen) -> Script {
    if seen.method == "GET" {
        return Script::json(200, &json!({"path": seen.path}));
    }
    if seen.json()["stream"] == json!(true) {
        let events = "data: {\"a\": \"\u{e9}\"}\r\n\r\n: comment\n\ndata:{\"b\":1}\n\n";
        return Script::events(vec![bytes(events), bytes(DONE)]);
    }
    Script::json(200, &json!({"id": "d", "usage": {"prompt_tokens": 130}, "path": seen.path}))
}

#[test]
fn one_leg_then_decode_with_what_prefill_announced() {
    // Goal: the whole path of the usual request, on both wires.
    block_on(async {
        let (prefill, decode) = (Server::start(prefills).await, Server::start(decodes).await);
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let body = "{\"model\":\"m\", \"prompt\":\"What date is today?\",\"max_tokens\":20}";
        let answer = post_text(proxy.port, "/v1/completions", &[], body).await;
        assert_eq!((answer.status, answer.json()["id"].as_str()), (200, Some("d")));
        let (leg, request) = (&prefill.seen()[0], &decode.seen()[0]);
        assert_eq!(leg.path, "/v1/completions");
        assert_eq!(
            leg.json(),
            json!({"model": "m", "prompt": "What date is today?",
            "stream": false, "max_tokens": 1, "n": 1})
        );
        let handoff = "{\"ucm\":{\"last_block_id\":\"ab\",\"tokens\":128,\"version\":1,\
                       \"writer\":\"w\"}}";
        let expected = format!("{},\"kv_transfer_params\":{handoff}}}", &body[..body.len() - 1]);
        assert_eq!(request.body, expected);
        assert_eq!(leg.header("x-request-id"), request.header("x-request-id"));
        assert_eq!(answer.header("x-request-id"), request.header("x-request-id"));
        assert_eq!(proxy.metric("ucm_proxy_handoffs_total").await, 1.0);
        assert_eq!(proxy.metric("ucm_proxy_prompt_token_mismatches_total").await, 0.0);
    });
}

#[test]
fn streams_pass_byte_by_byte_as_they_come() {
    // Goal: byte-exact, and an event is at the client before the server sends the next.
    block_on(async {
        let prefill = Server::start(prefills).await;
        let mut steps = Vec::new();
        let mut expected = String::new();
        for number in 0..5 {
            let event = format!("data: {{\"n\":{number}}}\n\n");
            expected.push_str(&event);
            // Also cut inside an event: half of it must not wait for the rest.
            let (head, tail) = event.split_at(9);
            steps.extend([bytes(head), wait(60), bytes(tail), wait(60)]);
        }
        steps.push(bytes(DONE));
        expected.push_str(DONE);
        let decode = Server::start(move |seen| match seen.method.as_str() {
            "GET" => Script::json(200, &json!({})),
            _ => Script::events(steps.clone()),
        })
        .await;
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let request = json!({"messages": [], "stream": true});
        let answer = post(proxy.port, "/v1/chat/completions", &request).await;
        assert!(answer.whole);
        assert_eq!(answer.text(), expected);
        assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
        assert_eq!(answer.pieces.len(), 11, "each piece by itself");
        let gaps = answer.pieces.windows(2).map(|pair| pair[1].0 - pair[0].0);
        let slow = gaps.filter(|gap| *gap > Duration::from_millis(30)).count();
        assert!(slow >= 9, "pieces came together: {:?}", answer.pieces);
    });
}

#[test]
fn odd_streams_arrive_unchanged() {
    // Goal: line ends, comments, no space after the colon, UTF-8: nothing is normalised.
    block_on(async {
        let (prefill, decode) = (Server::start(prefills).await, Server::start(decodes).await);
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let request = json!({"prompt": "x", "stream": true});
        let answer = post(proxy.port, "/v1/completions", &request).await;
        let expected =
            format!("data: {{\"a\": \"\u{e9}\"}}\r\n\r\n: comment\n\ndata:{{\"b\":1}}\n\n{DONE}");
        assert_eq!(answer.text(), expected);
    });
}

#[test]
fn several_prompts_get_one_leg_each() {
    // Goal: every prompt is computed once, decode gets one request with all promises in order.
    block_on(async {
        let prefill = Server::start(|seen| {
            let prompt =
                if seen.method == "POST" { seen.json()["prompt"].clone() } else { json!(0) };
            let params = json!({"ucm": {"version": 1, "of": prompt}});
            Script::json(
                200,
                &json!({"usage": {"prompt_tokens": 10}, "kv_transfer_params": params}),
            )
        })
        .await;
        let decode = Server::start(|_| Script::json(200, &json!({"usage": {"prompt_tokens": 29}})));
        let decode = decode.await;
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let request = json!({"prompt": ["a", "b", "c"], "max_tokens": 5});
        post(proxy.port, "/v1/completions", &request).await;
        let mut prompts: Vec<Value> =
            prefill.seen().iter().map(|leg| leg.json()["prompt"].clone()).collect();
        prompts.sort_by_key(Value::to_string);
        assert_eq!(prompts, ["a", "b", "c"]);
        let mut ids: Vec<_> =
            prefill.seen().iter().map(|leg| leg.header("x-request-id").to_owned()).collect();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 3, "servers name requests by this id");
        let [sent] = &decode.seen()[..] else { panic!("one request to decode") };
        assert_eq!(sent.json()["prompt"], request["prompt"]);
        let promises = &sent.json()["kv_transfer_params"]["ucm"]["promises"];
        let of: Vec<_> = promises.as_array().unwrap().iter().map(|p| p["of"].clone()).collect();
        assert_eq!(of, ["a", "b", "c"]);
        // 3 x 10 against 29: the sum is compared.
        assert_eq!(proxy.metric("ucm_proxy_prompt_token_mismatches_total").await, 1.0);
    });
}

#[test]
fn a_clients_transfer_params_are_taken_out_everywhere() {
    // Goal: with and without a leg, on generating and on passed paths, in mixed mode too.
    block_on(async {
        let plain = Server::start(|_| Script::json(200, &json!({"id": 1}))).await;
        let decode = Server::start(decodes).await;
        let proxy = Proxy::between(&[&plain], &[&decode], "").await;
        let mine = json!({"ucm": {"tokens": 1}, "do_remote_prefill": true});
        let leg = json!({"prompt": "x", "kv_transfer_params": mine});
        let no_leg = json!({"prompt": "x", "prompt_logprobs": 1, "kv_transfer_params": mine});
        post(proxy.port, "/v1/completions", &leg).await;
        post(proxy.port, "/v1/completions", &no_leg).await;
        post(proxy.port, "/v1/chat/completions/batch", &json!({"kv_transfer_params": mine})).await;
        let smuggled = "{\"prompt\":\"x\",\"n\":NaN,\"kv_transfer_params\":{}}";
        let refused = post_text(proxy.port, "/v1/completions", &[], smuggled).await;
        assert_eq!(refused.status, 400);
        assert!(refused.json()["error"]["message"].is_string());
        assert_eq!((plain.seen().len(), decode.seen().len()), (1, 3));
        for seen in plain.seen().iter().chain(&decode.seen()) {
            assert!(seen.json().get("kv_transfer_params").is_none(), "{seen:?}");
        }
        assert_eq!(proxy.metric("ucm_proxy_client_transfer_params_stripped_total").await, 2.0);
        let options = ["--worker-hosts", "127.0.0.1", "--worker-ports", &decode.port()];
        let mixed = Proxy::start(&options.map(str::to_owned), &[]).await;
        post(mixed.port, "/v1/completions", &leg).await;
        assert!(decode.seen()[3].json().get("kv_transfer_params").is_none());
    });
}

#[test]
fn answers_of_servers_keep_status_headers_and_bodies() {
    // Goal: an error of the server reaches the client as it is, hop-by-hop headers do not.
    block_on(async {
        let refuses = |seen: &Seen| match seen.method.as_str() {
            "GET" => Script::json(200, &json!({})),
            _ => Script::Reply {
                status: 422,
                headers: vec![
                    ("content-type".to_owned(), "application/problem+json".to_owned()),
                    ("x-odd".to_owned(), "1".to_owned()),
                    ("x-odd".to_owned(), "2".to_owned()),
                    ("x-request-id".to_owned(), "of-the-server".to_owned()),
                    ("keep-alive".to_owned(), "timeout=5".to_owned()),
                ],
                body: "{\"error\" : {\"message\": \"no such model\"}}".into(),
            },
        };
        let (prefill, decode) = (Server::start(refuses).await, Server::start(refuses).await);
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
        assert_eq!(answer.status, 422);
        assert_eq!(answer.text(), "{\"error\" : {\"message\": \"no such model\"}}");
        assert_eq!(answer.header("content-type"), "application/problem+json");
        assert_eq!(answer.header("x-request-id"), "of-the-server");
        assert_eq!(answer.headers.get_all("x-odd").iter().count(), 2);
        assert!(answer.headers.get("keep-alive").is_none());
        // A refusal of the request is no fault of the server.
        assert_eq!(proxy.metric("ucm_proxy_instance_failures_total").await, 0.0);
    });
}

#[test]
fn headers_reach_both_servers() {
    // Goal: credentials, ids, tracing; the key of the environment only for clients without.
    block_on(async {
        let (prefill, decode) = (Server::start(prefills).await, Server::start(decodes).await);
        let options = servers(&[&prefill], &[&decode]);
        let proxy = Proxy::start(&options, &[("OPENAI_API_KEY", "from-env")]).await;
        let headers = [
            ("authorization", "Bearer mine"),
            ("x-request-id", "id-1"),
            ("traceparent", "00-aa-bb-01"),
            ("connection", "x-hop"),
            ("x-hop", "1"),
        ];
        let answer = post_text(proxy.port, "/v1/completions", &headers, "{\"prompt\":\"x\"}").await;
        assert_eq!(answer.header("x-request-id"), "id-1");
        post_text(proxy.port, "/v1/completions", &[], "{\"prompt\":\"x\"}").await;
        for server in [&prefill, &decode] {
            let seen = server.seen();
            assert_eq!(seen[0].header("authorization"), "Bearer mine");
            assert_eq!(seen[0].header("x-request-id"), "id-1");
            assert_eq!(seen[0].header("traceparent"), "00-aa-bb-01");
            assert_eq!(seen[0].header("x-hop"), "");
            assert_eq!(seen[0].header("host"), server.address.to_string());
            assert_eq!(seen[1].header("authorization"), "Bearer from-env");
            assert_eq!(seen[1].header("x-request-id").len(), 32);
        }
    });
}

#[test]
fn requests_that_gain_nothing_get_no_leg() {
    // Goal: each exception reaches decode alone, counted by its reason.
    block_on(async {
        let (prefill, decode) = (Server::start(prefills).await, Server::start(decodes).await);
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        for (request, reason) in [
            (json!({"prompt_logprobs": 1}), "prompt_logprobs"),
            (json!({"echo": true, "logprobs": 1}), "echo_logprobs"),
            (json!({"max_tokens": 0}), "no_tokens"),
            (json!({"use_beam_search": true, "n": 2}), "beam_search"),
        ] {
            post(proxy.port, "/v1/completions", &request).await;
            let name = format!("ucm_proxy_prefill_skipped_total{{reason=\"{reason}\"}}");
            assert_eq!(proxy.metric(&name).await, 1.0, "{reason}");
            assert_eq!(decode.seen().last().unwrap().json(), request);
        }
        assert_eq!(prefill.seen().len(), 0);
    });
}

#[test]
fn every_endpoint_is_answered() {
    // Goal: the other generating forms get legs; the rest is passed to decode or goes everywhere.
    block_on(async {
        let (prefill, decode) = (Server::start(prefills).await, Server::start(decodes).await);
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let generating = ["/v1/responses", "/v1/messages", "/inference/v1/generate"];
        for path in generating {
            let request = json!({"input": "x", "messages": [], "sampling_params": {}});
            assert_eq!(post(proxy.port, path, &request).await.json()["path"], path);
            assert_eq!(prefill.seen().last().unwrap().path, path);
            assert!(decode.seen().last().unwrap().json()["kv_transfer_params"]["ucm"].is_object());
        }
        let legs = prefill.seen().len();
        for path in [
            "/v1/embeddings",
            "/pooling",
            "/score",
            "/rerank",
            "/tokenize",
            "/detokenize",
            "/v1/chat/completions/render",
            "/v1/messages/count_tokens",
            "/whatever?a=b",
        ] {
            assert_eq!(post(proxy.port, path, &json!({"input": "x"})).await.json()["path"], path);
        }
        for path in ["/v1/models", "/version", "/ping", "/v1/responses/resp_1"] {
            assert_eq!(get(proxy.port, path).await.json()["path"], path);
        }
        assert_eq!(prefill.seen().len(), legs, "none of these is for prefill");
        for path in ["/start_profile", "/stop_profile"] {
            assert_eq!(post_text(proxy.port, path, &[], "{}").await.status, 200);
            assert_eq!(prefill.seen().last().unwrap().path, path);
            assert_eq!(decode.seen().last().unwrap().path, path);
        }
        assert_eq!(get(proxy.port, "/health").await.status, 200);
        let page = get(proxy.port, "/healthcheck").await.json();
        assert_eq!((&page["status"], &page["mode"]), (&json!("ok"), &json!("pd-disaggregation")));
        assert_eq!((&page["prefill_instances"], &page["decode_instances"]), (&json!(1), &json!(1)));
        assert!(
            get(proxy.port, "/metrics").await.text().contains("# TYPE ucm_proxy_requests_total")
        );
    });
}

#[test]
fn uploads_and_large_answers_flow() {
    // Goal: a body that is no JSON passes unchanged, an answer over the buffer arrives whole.
    block_on(async {
        let large = "x".repeat(12 << 20);
        let body = large.clone();
        let decode = Server::start(move |seen| match seen.path.as_str() {
            "/v1/audio/transcriptions" => Script::json(
                200,
                &json!({"bytes": seen.body.len(), "type": seen.header("content-type")}),
            ),
            _ => Script::Reply { status: 200, headers: vec![], body: body.clone().into() },
        })
        .await;
        let prefill = Server::start(prefills).await;
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let headers = [("content-type", "multipart/form-data; boundary=b")];
        let upload = "y".repeat(3 << 20);
        let path = "/v1/audio/transcriptions";
        let answer = post_text(proxy.port, path, &headers, &upload).await.json();
        assert_eq!(answer, json!({"bytes": 3 << 20, "type": "multipart/form-data; boundary=b"}));
        let answer = get(proxy.port, "/large").await;
        assert_eq!(answer.header("content-length"), large.len().to_string());
        assert!(answer.whole && answer.text() == large);
    });
}

#[test]
fn stored_responses_go_to_the_server_that_has_them() {
    // Goal: with two decoders a continued conversation finds its own, without a prefill leg.
    block_on(async {
        let holder = |name: &'static str, id: &'static str| {
            move |seen: &Seen| match (seen.method.as_str(), seen.path.as_str()) {
                ("GET", path) if path.starts_with("/v1/responses/") && !path.ends_with(id) => {
                    Script::json(404, &json!({}))
                }
                _ => Script::json(200, &json!({"of": name})),
            }
        };
        let first = Server::start(holder("first", "resp_1")).await;
        let second = Server::start(holder("second", "resp_2")).await;
        let prefill = Server::start(prefills).await;
        let proxy = Proxy::between(&[&prefill], &[&first, &second], "").await;
        for (id, name) in [("resp_1", "first"), ("resp_2", "second"), ("resp_1", "first")] {
            let stored = get(proxy.port, &format!("/v1/responses/{id}")).await.json();
            assert_eq!(stored["of"], name);
            let request = json!({"input": "x", "previous_response_id": id});
            assert_eq!(post(proxy.port, "/v1/responses", &request).await.json()["of"], name);
        }
        assert_eq!(prefill.seen().len(), 0);
    });
}

#[test]
fn the_access_log_tells_a_requests_story() {
    // Goal: one JSON line with servers, times and outcome.
    block_on(async {
        let (prefill, decode) = (Server::start(prefills).await, Server::start(decodes).await);
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let headers = [("x-request-id", "story")];
        let body = "{\"prompt\":\"x\",\"stream\":true}";
        post_text(proxy.port, "/v1/completions", &headers, body).await;
        eventually("a line", || proxy.access_log().contains("story")).await;
        let line: Value = serde_json::from_str(proxy.access_log().lines().next().unwrap()).unwrap();
        assert_eq!((&line["status"], &line["outcome"]), (&json!(200), &json!("finished")));
        assert_eq!(line["prefill"], json!([prefill.address.to_string()]));
        assert_eq!(line["server"], decode.address.to_string());
        assert_eq!((&line["handoff"], &line["events"]), (&json!(true), &json!(3)));
        assert!(line["first_byte_ms"].as_f64() <= line["duration_ms"].as_f64());
        let metrics = client::get(proxy.port, "/metrics").await.text();
        assert!(metrics.contains("ucm_proxy_time_to_first_token_seconds_count 1"), "{metrics}");
        let of = |role: &str, server: &Server| {
            format!("_count{{role=\"{role}\",instance=\"{}\"}} 1", server.address)
        };
        for (name, of) in [
            ("seconds", of("prefill", &prefill)),
            ("seconds", of("decode", &decode)),
            ("time_to_first_token_seconds", of("decode", &decode)),
            ("time_per_output_token_seconds", of("decode", &decode)),
            ("handoff_wait_seconds", of("decode", &decode)),
        ] {
            assert!(metrics.contains(&format!("ucm_proxy_instance_{name}{of}")), "{name}");
        }
    });
}
