//! `weft serve`: runs the server until SIGTERM or Ctrl-C.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use super::common::{Failure, Output, Stop, Style, mint};
use super::demo;
use crate::app::App;
use crate::clock;
use crate::config::{Config, ServeArgs};

/// The user of the development token.
const DEV_TENANT: &str = "demo";
const DEV_USER: &str = "ada";
const DEV_TTL: u64 = 7 * 24 * 60 * 60;

/// Damage in new projections so soon is not that of old files.
const SOON: Duration = Duration::from_secs(10 * 60);
const START_ATTEMPTS: usize = 10;

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
    if config.dev && config.jwt_secret.is_none() && config.jwt_key.is_none() {
        config.jwt_secret = Some(dev_secret(&config.data)?);
    }
    // Only with --dev is there a token to print.
    let secret = config.jwt_secret.clone().filter(|_| config.dev);

    // Each connection is a descriptor; the soft limit of many systems is 1,024.
    if let Err(error) = rlimit::increase_nofile_limit(u64::MAX) {
        tracing::warn!(%error, "cannot raise the number of open files");
    }
    let mut stop = Stop::new()?;

    let data = config.data.clone();
    let mut app = App::start(config.clone()).await?;
    (config.listen, config.admin_listen) = (app.address, app.admin);
    let mut restarted: Option<Instant> = None;
    let result = loop {
        let play = args.demo && restarted.is_none();
        let damage = tokio::select! {
            result = serve(&app, &data, secret.as_deref(), play) => break result,
            () = stop.asked() => break Ok(()),
            damage = app.projections_damaged() => damage,
        };
        tracing::error!(damage, "the projections are damaged: draining, then starting anew");
        app.stop().await;
        if restarted.is_some_and(|at| at.elapsed() < SOON) {
            return Err(
                format!("the projections were damaged again ({damage}): look at the disk and the memory").into()
            );
        }
        app = start_anew(&config).await?;
        restarted = Some(Instant::now());
    };
    tracing::info!("draining");
    app.stop().await;
    tracing::info!("weft is down");
    result
}

/// Starts a server in place of one that has stopped. What that one still holds it lets go of in a moment.
async fn start_anew(config: &Config) -> Result<App, Failure> {
    let mut attempts = 1..=START_ATTEMPTS;
    loop {
        match App::start(config.clone()).await {
            Err(error) if attempts.next().is_some() => tracing::warn!(%error, "not yet: trying again"),
            result => return Ok(result?),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Says that the server is up, once it is; ends only with an error.
async fn serve(app: &App, data: &Path, secret: Option<&str>, demo: bool) -> Result<(), Failure> {
    let ready = app.ready().await;
    let url = format!("http://{}", app.address);
    if let Err(why) = ready {
        // It stays up, so that `/readyz` says the same to whoever looks after it.
        println!("weft is up on {url} and serves nothing: it must be upgraded: {why}");
        return std::future::pending().await;
    }
    tracing::info!(address = %app.address, data = %data.display(), "weft is up");
    let admin = app.admin.map_or(String::new(), |admin| format!(", metrics: http://{admin}/metrics"));
    Output::new().line(format!("weft is up on {url} (WebSocket: ws://{}/v1/ws{admin})", app.address))?;
    if let Some(secret) = secret {
        welcome(&url, secret, demo).await?;
    }
    std::future::pending().await
}

/// Plays the demo with `--demo`, and prints what a newcomer needs.
async fn welcome(url: &str, secret: &str, play: bool) -> Result<(), Failure> {
    let mint = |sub: &str, scope: &str| mint(secret, DEV_TENANT, sub, scope, DEV_TTL);
    let thread = if play { demo::play(url, &mint).await? } else { "*".to_owned() };
    let token = mint(DEV_USER, "")?;
    let out = Output::new();
    out.line("")?;
    out.line(format!("{}  {url}", out.paint(Style::Bold, "address")))?;
    out.line(format!("{}    {token}", out.paint(Style::Bold, "token")))?;
    // With its path: the folder may not be in the newcomer's PATH.
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
