#!/usr/bin/env bash
# A real Kafka broker (KRaft, one node, loopback only) for development and tests; needs Java 17, and Maven the first time.
#
#   kafka.sh start            returns when the broker answers
#   kafka.sh stop             keeps the data
#   kafka.sh status           prints where it listens; 1 when it does not run
#   kafka.sh consume TOPIC    prints partition, offset, headers, key and value from the beginning on (more options follow)
#   kafka.sh groups           how far every consumer group lags
#   kafka.sh tool CLASS ARGS  any other of Kafka's own tools, for instance org.apache.kafka.tools.TopicCommand --help
#
# WEFT_KAFKA_DIR (.kafka in the checkout) holds data, settings, pid and log; WEFT_KAFKA_PORT is 9092, and the controller
# has the port after it. Brokers with a directory and a port of their own run beside each other.
#
# With WEFT_KAFKA_SASL=1 a new broker wants TLS and SCRAM-SHA-512 (user weft, password weft-secret): SASL_SSL on its port,
# with the certificate of the authority in $WEFT_KAFKA_DIR/tls/ca.pem, and SASL_PLAINTEXT on the second port after it.
# `consume` and `groups` then use the settings in $WEFT_KAFKA_DIR/client.properties.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pom=$root/kafka/pom.xml
dir=${WEFT_KAFKA_DIR:-$root/.kafka}
port=${WEFT_KAFKA_PORT:-9092}
sasl=${WEFT_KAFKA_SASL:-}
# What is asked whether the broker answers: before they authenticate, clients may ask for versions, but not without TLS.
probe=$((sasl ? port + 2 : port))
version=$(sed -n 's:.*<kafka.version>\(.*\)</kafka.version>.*:\1:p' "$pom")
# Outside of the checkout, so that a clean one does not fetch 54 MB again.
libs=${XDG_CACHE_HOME:-$HOME/.cache}/weft/kafka-libs-$version

fail() {
  echo "kafka.sh: $*" >&2
  exit 1
}

fetch_libs() {
  [ -d "$libs" ] && return
  command -v mvn >/dev/null || fail "Maven is needed once to fetch Kafka $version (mvn not found)"
  mkdir -p "$(dirname "$libs")"
  local half
  half=$(mktemp -d "$libs.XXXXXX")
  echo "fetching Kafka $version" >&2
  mvn -q -B -Dstyle.color=never -f "$pom" dependency:copy-dependencies -DoutputDirectory="$half" >&2 || {
    rm -rf "$half"
    fail "could not fetch Kafka's jars"
  }
  # In one step, so that another start at the same time never sees half of them; the one that comes second removes its copy.
  mv -T "$half" "$libs" 2>/dev/null || rm -rf "$half"
}

run_java() {
  command -v java >/dev/null || fail "Java 17 is needed (java not found)"
  fetch_libs
  exec java -Djava.awt.headless=true -Dlog4j2.configurationFile="$dir/log4j2.properties" "$@"
}

tool() {
  [ -f "$dir/log4j2.properties" ] || write_settings
  run_java -Xmx256m -XX:TieredStopAtLevel=1 -Dlog4j2.level=WARN -cp "$libs/*" "$@"
}

# The pid of our broker; after a crash the pid file may name a process that is not ours.
broker_pid() {
  local pid
  pid=$(cat "$dir/pid" 2>/dev/null) || return 1
  ps -p "$pid" -o args= 2>/dev/null | grep -qF -- "$dir/server.properties" || return 1
  echo "$pid"
}

# Sends an ApiVersions request by hand: a port that is open does not show that the broker answers, and a tool needs a second to start.
answers() {
  timeout 2 bash -c '
    exec 3<>/dev/tcp/127.0.0.1/'"$probe"' || exit 1
    printf "\0\0\0\012\0\022\0\0\0\0\0\01\377\377" >&3
    [ "$(head -c 8 <&3 | wc -c)" -eq 8 ]' 2>/dev/null
}

write_settings() {
  mkdir -p "$dir"
  : >"$dir/client.properties"
  cat >"$dir/server.properties" <<EOF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$((port + 1))
controller.listener.names=CONTROLLER
log.dirs=$dir/data
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
log.cleaner.backoff.ms=100
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
EOF
  if [ -n "$sasl" ]; then
    write_sasl_settings
  else
    cat >>"$dir/server.properties" <<EOF
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$((port + 1))
advertised.listeners=PLAINTEXT://127.0.0.1:$port
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
EOF
  fi
  cat >"$dir/log4j2.properties" <<'EOF'
appender.out.type=Console
appender.out.name=out
appender.out.target=SYSTEM_ERR
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d %p %c{1}: %m%n
rootLogger.level=${sys:log4j2.level:-INFO}
rootLogger.appenderRef.out.ref=out
EOF
}

# TLS and SASL: the broker uses its own user between its listeners as well.
write_sasl_settings() {
  [ -f "$dir/tls/server.pem" ] || make_certificates
  local login='org.apache.kafka.common.security.scram.ScramLoginModule required username="weft" password="weft-secret";'
  cat >>"$dir/server.properties" <<EOF
listeners=SASL_SSL://127.0.0.1:$port,CONTROLLER://127.0.0.1:$((port + 1)),SASL_PLAINTEXT://127.0.0.1:$((port + 2))
advertised.listeners=SASL_SSL://127.0.0.1:$port,SASL_PLAINTEXT://127.0.0.1:$((port + 2))
listener.security.protocol.map=SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT
inter.broker.listener.name=SASL_PLAINTEXT
sasl.enabled.mechanisms=SCRAM-SHA-512
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=$login
listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config=$login
ssl.keystore.type=PEM
ssl.keystore.location=$dir/tls/server.pem
EOF
  cat >"$dir/client.properties" <<EOF
security.protocol=SASL_SSL
sasl.mechanism=SCRAM-SHA-512
sasl.jaas.config=$login
ssl.truststore.type=PEM
ssl.truststore.location=$dir/tls/ca.pem
EOF
}

# An authority of our own, and a certificate of it for this machine; tls/other-ca.pem is an authority that has signed nothing.
make_certificates() {
  command -v openssl >/dev/null || fail "openssl is needed for WEFT_KAFKA_SASL (openssl not found)"
  mkdir -p "$dir/tls"
  (
    cd "$dir/tls"
    for name in ca other-ca; do
      openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=weft test $name" -keyout "$name.key" -out "$name.pem"
    done
    openssl req -newkey rsa:2048 -nodes -subj "/CN=localhost" -keyout server.key -out server.csr
    openssl x509 -req -days 3650 -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.crt \
      -extfile <(echo "subjectAltName=IP:127.0.0.1,DNS:localhost")
    # Kafka reads only this form of a key.
    openssl pkcs8 -topk8 -nocrypt -in server.key -out server.p8
    cat server.p8 server.crt ca.pem >server.pem
  ) 2>"$dir/openssl.log" || {
    cat "$dir/openssl.log" >&2
    fail "could not make certificates in $dir/tls"
  }
}

start() {
  if broker_pid >/dev/null && answers; then
    status
    return
  fi
  broker_pid >/dev/null && fail "the broker runs (pid $(broker_pid)), but does not answer on port $port; see $dir/kafka.log"
  answers && fail "something else answers on port $probe; choose another one with WEFT_KAFKA_PORT"
  fetch_libs
  write_settings
  if [ ! -f "$dir/data/meta.properties" ]; then
    # A cluster id is 16 random bytes in base64url; a leading dash would be read as an option.
    local id
    id=$(head -c 16 /dev/urandom | base64 | tr '+/' '-_' | cut -c1-22 | sed 's/^-/A/')
    local users=()
    [ -z "$sasl" ] || users=(--add-scram 'SCRAM-SHA-512=[name=weft,password=weft-secret]')
    (tool kafka.tools.StorageTool format -t "$id" -c "$dir/server.properties" "${users[@]}") >"$dir/format.log" 2>&1 || {
      cat "$dir/format.log" >&2
      fail "could not format $dir/data"
    }
  fi
  (run_java -Xmx512m -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -cp "$libs/*" kafka.Kafka "$dir/server.properties") \
    >"$dir/kafka.log" 2>&1 </dev/null &
  local pid=$!
  echo "$pid" >"$dir/pid"
  local deadline=$((SECONDS + 60))
  until answers; do
    if ! kill -0 "$pid" 2>/dev/null || [ $SECONDS -ge $deadline ]; then
      kill -KILL "$pid" 2>/dev/null || true
      rm -f "$dir/pid"
      tail -n 30 "$dir/kafka.log" >&2
      fail "the broker did not start; the above is the end of $dir/kafka.log"
    fi
    sleep 0.2
  done
  status
}

stop() {
  local pid
  if pid=$(broker_pid); then
    kill -TERM "$pid"
    # A stopped process does not get the TERM before it is continued.
    kill -CONT "$pid"
    local deadline=$((SECONDS + 30))
    # Not kill -0: that also finds a zombie.
    while broker_pid >/dev/null; do
      [ $SECONDS -lt $deadline ] || kill -KILL "$pid" 2>/dev/null || true
      sleep 0.1
    done
  fi
  rm -f "$dir/pid"
}

status() {
  local pid
  pid=$(broker_pid) || fail "not running ($dir)"
  answers || fail "running (pid $pid), but not answering on 127.0.0.1:$port"
  echo "Kafka $version on 127.0.0.1:$port, pid $pid, in $dir"
}

command=${1:-}
[ $# -gt 0 ] && shift
case $command in
  start) start ;;
  stop) stop ;;
  status) status ;;
  consume)
    [ $# -gt 0 ] || fail "usage: kafka.sh consume TOPIC [options of Kafka's console consumer]"
    topic=$1
    shift
    tool org.apache.kafka.tools.consumer.ConsoleConsumer --bootstrap-server "127.0.0.1:$port" --topic "$topic" \
      --consumer.config "$dir/client.properties" --from-beginning --property print.partition=true --property print.offset=true \
      --property print.headers=true --property print.key=true "$@"
    ;;
  groups)
    tool org.apache.kafka.tools.consumer.group.ConsumerGroupCommand --bootstrap-server "127.0.0.1:$port" \
      --command-config "$dir/client.properties" --describe --all-groups
    ;;
  tool)
    [ $# -gt 0 ] || fail "usage: kafka.sh tool CLASS [arguments]"
    tool "$@"
    ;;
  *) fail "usage: kafka.sh start | stop | status | consume TOPIC | groups | tool CLASS ARGS" ;;
esac
