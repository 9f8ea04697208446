//! HTTP: the operations of AWS JSON by `X-Amz-Target`, and the stand-in's own routes under `/_stand-in/`.

use crate::settings::{Changes, Stats};
use crate::{State, dynamodb, sqs};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::rc::Rc;
use tokio::net::TcpStream;

pub async fn serve(connection: TcpStream, state: Rc<State>) {
    let service = service_fn(move |request| answer(request, Rc::clone(&state)));
    // An error is a connection that the client has closed.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(connection), service).await;
}

async fn answer(request: Request<Incoming>, state: Rc<State>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await.map(http_body_util::Collected::to_bytes) else {
        return Ok(response(StatusCode::BAD_REQUEST, Bytes::new()));
    };
    if head.method != Method::POST && !head.uri.path().starts_with("/_stand-in/") {
        // S3: the bucket exists, and every object is the code.
        let is_object = head.method == Method::GET && head.uri.path().trim_matches('/').contains('/');
        return Ok(response(StatusCode::OK, if is_object { state.code.clone() } else { Bytes::new() }));
    }
    let target = head.headers.get("x-amz-target").and_then(|target| target.to_str().ok());
    let answer = match target.and_then(|target| target.split_once('.')) {
        Some((service, operation)) => {
            count(&state, operation);
            match service {
                "AmazonSQS" => sqs::call(&state, operation, &body).await,
                _ => dynamodb::call(&state, operation, &body).await,
            }
        }
        None => Some(own(&state, head.uri.path(), &body)),
    };
    match answer {
        Some((status, body)) => Ok(response(status, body)),
        None => std::future::pending().await,
    }
}

fn count(state: &State, operation: &str) {
    let operations = &mut state.stats.borrow_mut().operations;
    match operations.get_mut(operation) {
        Some(count) => *count += 1,
        None => {
            operations.insert(operation.to_owned(), 1);
        }
    }
}

fn own(state: &State, path: &str, body: &[u8]) -> (StatusCode, Bytes) {
    match path {
        "/_stand-in/stats" => {
            let mut stats = state.stats.borrow_mut();
            stats.rows = state.rows.borrow().len();
            if let Some(worker) = &state.worker {
                (stats.redis_commands, stats.published, stats.unpublished) = worker.counts();
            }
            (StatusCode::OK, json(&*stats))
        }
        "/_stand-in/settings" => match serde_json::from_slice::<Changes>(body) {
            Ok(changes) => {
                state.settings.borrow_mut().change(&changes);
                (StatusCode::OK, json(&*state.settings.borrow()))
            }
            Err(e) => (StatusCode::BAD_REQUEST, e.to_string().into()),
        },
        "/_stand-in/reset" => {
            *state.stats.borrow_mut() = Stats::default();
            state.rows.borrow_mut().clear();
            if let Some(worker) = &state.worker {
                worker.reset();
            }
            (StatusCode::OK, Bytes::new())
        }
        _ => (StatusCode::NOT_FOUND, Bytes::new()),
    }
}

pub fn json(value: &impl serde::Serialize) -> Bytes {
    serde_json::to_vec(value).unwrap_or_default().into()
}

fn response(status: StatusCode, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let value = hyper::header::HeaderValue::from_static("application/x-amz-json-1.0");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, value);
    response
}
