//! `weft serve`: the server, until it is told to stop.

use std::io::Write;
use std::path::Path;

use tokio::signal::unix::{SignalKind, signal};

use super::common::{Failure, Output, Style, mint};
use super::demo;
use crate::app::App;
use crate::clock;
use crate::config::{Config, ServeArgs};

/// Who the development token is for.
const DEV_TENANT: &str = "demo";
const DEV_USER: &str = "ada";
const DEV_TTL: u64 = 7 * 24 * 60 * 60;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    serve: ServeArgs,
    /// With --dev: play a demo conversation once the server is up
    #[arg(long, requires = "dev")]
    demo: bool,
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut config = Config::load(args.serve.storage.config.as_deref(), &args.serve)?;
    let secret = if config.dev && config.jwt_secret.is_none() && config.jwt_key.is_none() {
        let secret = dev_secret(&config.data)?;
        config.jwt_secret = Some(secret.clone());
        Some(secret)
    } else {
        config.jwt_secret.clone()
    };
    // Each connection is a descriptor; the soft limit of many systems is 1,024.
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!(%error, "cannot raise the number of open files");
    }
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let dev = config.dev;
    let data = config.data.clone();
    let app = App::start(config).await?;
    let url = format!("http://{}", app.address);
    tokio::select! {
        () = app.ready() => {}
        _ = term.recv() => return stop(app).await,
        _ = interrupt.recv() => return stop(app).await,
    }
    tracing::info!(address = %app.address, data = %data.display(), "weft is up");
    println!("weft is up on {url} (WebSocket: ws://{}/v1/ws)", app.address);
    let greet = async {
        match (dev, &secret) {
            (true, Some(secret)) => welcome(&url, secret, args.demo).await,
            _ => Ok(()),
        }
    };
    let serve = async {
        greet.await?;
        std::future::pending::<Result<(), Failure>>().await
    };
    let result = tokio::select! {
        result = serve => result,
        _ = term.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    stop(app).await.and(result)
}

async fn stop(app: App) -> Result<(), Failure> {
    tracing::info!("draining");
    app.stop().await;
    tracing::info!("weft is down");
    Ok(())
}

/// Plays the demo if wanted, and prints what a newcomer needs.
async fn welcome(url: &str, secret: &str, play: bool) -> Result<(), Failure> {
    let mint = |sub: &str, scope: &str| mint(secret, DEV_TENANT, sub, scope, DEV_TTL);
    let thread = if play { demo::play(url, &mint).await? } else { "*".to_owned() };
    let token = mint(DEV_USER, "")?;
    let out = Output::new();
    out.line("")?;
    out.line(format!("{}  {url}", out.paint(Style::Bold, "address")))?;
    out.line(format!("{}    {token}", out.paint(Style::Bold, "token")))?;
    // With its path: a newcomer's shell does not know the command yet.
    let weft = std::env::current_exe().map_or("weft".to_owned(), |path| path.display().to_string());
    let begin = if thread == "*" { "" } else { " --after 0" };
    let line = format!("WEFT_TOKEN={token} {weft} tail --url {url} '{thread}'{begin}");
    out.line(format!("{}  {line}", out.paint(Style::Bold, "try it")))?;
    out.line(out.paint(Style::Dim, "stop with Ctrl-C"))?;
    Ok(())
}

/// The development secret of a data folder, made on first use, so that tokens outlive a restart.
fn dev_secret(data: &Path) -> Result<String, Failure> {
    let path = data.join("dev-secret");
    match std::fs::read_to_string(&path) {
        Ok(secret) if !secret.trim().is_empty() => return Ok(secret.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("{}: {error}", path.display()).into()),
    }
    std::fs::create_dir_all(data)?;
    let secret = format!("{}{}", clock::random_id().simple(), clock::random_id().simple());
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(&path)?.write_all(secret.as_bytes())?;
    Ok(secret)
}
