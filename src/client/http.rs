//! Plain HTTP/1.1 on one connection that is kept open, for what the WebSocket has no command for.

use std::ops::ControlFlow;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::{Address, ClientError};

pub struct Http {
    requests: SendRequest<Full<Bytes>>,
    authority: String,
    token: String,
}

impl Http {
    pub async fn connect(url: &str, token: &str) -> Result<Http, ClientError> {
        let address: Address = url.parse()?;
        let authority = address.authority().to_owned();
        let refused = |source| ClientError::Connect { to: authority.clone(), source };
        let stream = TcpStream::connect(&authority).await.map_err(refused)?;
        stream.set_nodelay(true).map_err(refused)?;
        let (requests, connection) = handshake(TokioIo::new(stream)).await.map_err(lost)?;
        // Ends when `requests` is dropped. Its error is dropped because the request that fails reports it too.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Http { requests, authority, token: token.to_owned() })
    }

    pub async fn get(&mut self, path: &str) -> Result<Value, ClientError> {
        json(&self.ask(Method::GET, path, None).await?)
    }

    /// For a body that is not JSON, such as that of `/metrics`.
    pub async fn get_text(&mut self, path: &str) -> Result<String, ClientError> {
        let body = self.ask(Method::GET, path, None).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    pub async fn put(&mut self, path: &str, body: &Value) -> Result<Value, ClientError> {
        json(&self.ask(Method::PUT, path, Some(body)).await?)
    }

    pub async fn post(&mut self, path: &str, body: &Value) -> Result<Value, ClientError> {
        json(&self.ask(Method::POST, path, Some(body)).await?)
    }

    pub async fn delete(&mut self, path: &str) -> Result<Value, ClientError> {
        json(&self.ask(Method::DELETE, path, None).await?)
    }

    /// All rows of a list that comes in pages, under the name of its field. `path` has a query already.
    pub async fn all_pages(&mut self, path: &str, field: &str) -> Result<Vec<Value>, ClientError> {
        let mut rows = Vec::new();
        self.each_page(path, field, |page| {
            rows.extend(page);
            Ok::<_, ClientError>(ControlFlow::Continue(()))
        })
        .await?;
        Ok(rows)
    }

    /// Hands the rows of such a list over page by page, until there are no more or `take` has enough.
    pub async fn each_page<E: From<ClientError>>(
        &mut self,
        path: &str,
        field: &str,
        mut take: impl FnMut(Vec<Value>) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        let mut next = path.to_owned();
        loop {
            let mut page = self.get(&next).await?;
            let goes_on = match page[field].take() {
                Value::Array(rows) => take(rows)?,
                other => {
                    return Err(ClientError::Malformed(format!("{other} in place of a list of {field}")).into());
                }
            };
            if goes_on.is_break() {
                return Ok(());
            }
            match page["next"].as_str() {
                Some(cursor) => next = format!("{path}&cursor={cursor}"),
                None => return Ok(()),
            }
        }
    }

    /// Hands a body over piece by piece, as it comes: for those that are too large to hold.
    pub async fn get_in_pieces<E: From<ClientError>>(
        &mut self,
        path: &str,
        mut take: impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut body = self.send(Method::GET, path, None).await?;
        while let Some(frame) = body.frame().await {
            if let Ok(piece) = frame.map_err(lost)?.into_data() {
                take(piece)?;
            }
        }
        Ok(())
    }

    async fn ask(&mut self, method: Method, path: &str, body: Option<&Value>) -> Result<Bytes, ClientError> {
        Ok(self.send(method, path, body).await?.collect().await.map_err(lost)?.to_bytes())
    }

    /// The body of the answer to a request that was not refused.
    async fn send(&mut self, method: Method, path: &str, body: Option<&Value>) -> Result<Incoming, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.authority)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token));
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = request.body(Full::from(body)).map_err(|_| ClientError::Token)?;

        self.requests.ready().await.map_err(lost)?;
        let answer = self.requests.send_request(request).await.map_err(lost)?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer.into_body());
        }
        let body = answer.into_body().collect().await.map_err(lost)?.to_bytes();
        Err(ClientError::Refused { status: status.as_u16(), body: String::from_utf8_lossy(&body).into_owned() })
    }
}

fn lost(error: hyper::Error) -> ClientError {
    ClientError::Lost(Box::new(error))
}

/// An empty answer (204) is `null`.
fn json(body: &[u8]) -> Result<Value, ClientError> {
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(body).map_err(|error| ClientError::Malformed(error.to_string()))
}
