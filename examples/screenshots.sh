#!/usr/bin/env bash
# Pictures of the status page and of `top`, as the README shows them: a shop under load whose pods are the three servers
# of whoami.
#
#   examples/screenshots.sh [FOLDER]       # default: examples/pictures/
#
# Needs chromium and tmux. All addresses are loopback: nothing here needs root, and nobody else is asked for anything. Takes a
# minute, as the curves are those of that minute. PROFILE=dev takes a debug build.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly server=127.0.0.1:10349 pictures=${1:-examples/pictures} profile=${PROFILE:-release}
readonly pods=(127.244.1.1:8000 127.244.1.2:8000 127.244.1.3:8000)
# Nobody answers there.
readonly gone=127.244.1.9:8000
readonly loaded=(cart checkout search web)
readonly seconds=60
# Of the terminal that `top` is in, and of a character in it.
readonly columns=124 lines=20 character_width=8.43 line_height=18

main() {
    local program
    program=$(find_browser)
    if ! command -v tmux >/dev/null; then
        printf 'error: no tmux: apt-get install tmux\n' >&2
        exit 1
    fi
    cargo build --profile "$profile" --bin kube-relay --example whoami
    built=${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}
    mkdir -p "$pictures"
    scratch=$(mktemp -d)
    trap stop EXIT
    start_relay
    start_load
    terminal new-session -d -x "$columns" -y "$lines" "$(realpath "$built/kube-relay")" top --server "$server"
    open_page "$program"
    sleep "$((seconds / 2))"
    # Something that happens.
    service reviews --port 8080 "${pods[1]}" "${pods[2]}" >"$scratch/shop/reviews.yaml"
    sleep "$((seconds / 2))"

    take light.png 1280 860
    become dark
    take dark.png 1280 860
    become light
    show '#/shop/checkout'
    take service.png 1280 860
    show '#/'
    take phone.png 412 860
    take_terminal top.png
    # One is left, at the cursor.
    terminal send-keys / c h e c k Enter Enter
    sleep 20
    take_terminal top-service.png
    printf 'look at them: %s\n' "$pictures"/*.png
}

find_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name"; then return; fi
    done
    printf 'error: no chromium: apt-get install chromium\n' >&2
    exit 1
}

# The servers, and beside the relay that whoami is itself another one, which these pictures are of.
start_relay() {
    "$built/examples/whoami" >"$scratch/whoami.log" 2>&1 &
    started+=("$!")
    await 127.0.0.1:10249 whoami
    mkdir "$scratch/shop"
    manifests >"$scratch/shop/all.yaml"
    "$built/kube-relay" run -f "$scratch/shop" --state-dir "$scratch/state" --metrics-bind-address "$server" \
        --healthz-bind-address none >"$scratch/relay.log" 2>&1 &
    started+=("$!")
    await "$server" relay
}

# await IP:PORT LOG: until somebody answers at /readyz there.
await() {
    local tries status
    for tries in {1..100}; do
        if exec 3<>"/dev/tcp/${1/:/\/}"; then
            printf 'GET /readyz HTTP/1.0\r\n\r\n' >&3
            read -r _ status _ <&3 || status=
            exec 3>&-
            if [ "$status" = 200 ]; then return; fi
        fi 2>/dev/null
        sleep 0.1
    done
    printf 'error: %s is not ready after %s tries:\n' "$2" "$tries" >&2
    cat "$scratch/$2.log" >&2
    exit 1
}

manifests() {
    service web --port 80 --node-port auto "${pods[@]}"
    service cart --port 6379 --sticky "${pods[0]}" "${pods[1]}"
    service checkout --port 8443 "${pods[@]}" "$gone"
    service search --port 9200 "${pods[2]}"
    service mail --port 25 "$gone"
    # Its pods are not there yet.
    "$built/kube-relay" new service payments --namespace shop --port 8080 --backend 127.244.1.8:8000 |
        sed 's/addresses: \(.*\)$/addresses: \1\n  conditions: {ready: false}/'
    printf -- '---\napiVersion: v1\nkind: Service\nmetadata: {name: legacy, namespace: shop}\n'
    printf 'spec: {type: ExternalName, externalName: shop.example.com}\n'
}

# service NAME FLAG… BACKEND…
service() {
    local name=$1 arguments=() argument
    shift
    for argument; do
        case $argument in 127.*) arguments+=(--backend) ;; esac
        arguments+=("$argument")
    done
    "$built/kube-relay" new service "$name" --namespace shop "${arguments[@]}"
    printf -- '---\n'
}

# For each of these Services two clients, one request after the other, with pauses as people make them.
start_load() {
    local name host port
    "$built/kube-relay" env shop --server "$server" >"$scratch/env"
    for name in "${loaded[@]}"; do
        host=$(sed -n "s/^${name^^}_SERVICE_HOST=//p" "$scratch/env")
        port=$(sed -n "s/^${name^^}_SERVICE_PORT=//p" "$scratch/env")
        for _ in 1 2; do
            while request "$host" "$port"; do sleep "0.0$((RANDOM % 90 + 10))"; done 2>/dev/null &
            started+=("$!")
        done
    done
}

request() {
    exec 3<>"/dev/tcp/$1/$2" || return
    printf 'GET / HTTP/1.0\r\n\r\n' >&3
    cat <&3 >/dev/null
    exec 3>&-
}

# A browser that obeys orders: JSON with a zero byte behind it, by its descriptors 3 and 4.
open_page() {
    local sandbox=() target
    # It refuses to be root with one; what it shows is ours.
    if [ "$(id -u)" -eq 0 ]; then sandbox=(--no-sandbox); fi
    coproc browser {
        exec "$1" --headless --remote-debugging-pipe --disable-gpu --hide-scrollbars --lang=en-US --no-first-run \
            --no-proxy-server --disable-background-networking --disable-component-update --disable-sync \
            --host-resolver-rules='MAP * ~NOTFOUND , EXCLUDE 127.*' --user-data-dir="$scratch/profile" \
            "${sandbox[@]}" 3<&0 4>&1 </dev/null >"$scratch/browser.log" 2>&1
    }
    started+=("$browser_PID")
    order Target.createTarget '{"url":"about:blank"}'
    target=$(field targetId)
    order Target.attachToTarget "{\"targetId\":\"$target\",\"flatten\":true}"
    session=$(field sessionId)
    resize 1280 860
    order Page.navigate "{\"url\":\"http://$server/\"}"
}

# order METHOD PARAMETERS: leaves what the browser says to it in $answer.
order() {
    number=$((number + 1))
    printf '{"id":%d,"method":"%s","params":%s%s}\0' \
        "$number" "$1" "$2" "${session:+,\"sessionId\":\"$session\"}" >&"${browser[1]}"
    while IFS= read -r -d '' answer <&"${browser[0]}"; do
        case $answer in "{\"id\":$number,"*) return ;; esac
    done
    printf 'error: the browser does not answer to %s:\n' "$1" >&2
    cat "$scratch/browser.log" >&2
    exit 1
}

# field NAME: of the last answer.
field() {
    local rest=${answer#*"\"$1\":\""}
    printf '%s' "${rest%%\"*}"
}

resize() {
    order Emulation.setDeviceMetricsOverride "{\"width\":$1,\"height\":$2,\"deviceScaleFactor\":1,\"mobile\":false}"
}

become() {
    order Emulation.setEmulatedMedia "{\"features\":[{\"name\":\"prefers-color-scheme\",\"value\":\"$1\"}]}"
}

# Some polls long, so that there is something to be seen.
show() {
    order Runtime.evaluate "{\"expression\":\"location.hash = '$1'\"}"
    sleep 20
}

# take FILE WIDTH HEIGHT
take() {
    resize "$2" "$3"
    sleep 1
    order Page.captureScreenshot '{"format":"png"}'
    field data | base64 --decode >"$pictures/$1"
}

terminal() {
    env -u TMUX LC_ALL=C.UTF-8 tmux -S "$scratch/tmux" -f /dev/null "$@"
}

# take_terminal FILE: what a terminal shows, as a page, as a picture.
take_terminal() {
    local page
    page=$(terminal capture-pane -e -p | as_page | base64 --wrap=0)
    order Page.navigate "{\"url\":\"data:text/html;charset=utf-8;base64,$page\"}"
    take "$1" "$(awk "BEGIN { printf \"%d\", $columns * $character_width + 32 }")" "$((lines * line_height + 24))"
}

# Escape sequences as spans. Those of tmux: each sets some of weight, brightness, line, reversal and colour, or all anew.
as_page() {
    printf '<!doctype html><meta charset="utf-8"><style>body{margin:0;background:#16181d}pre{margin:12px 16px;'
    printf 'font:14px/%dpx "DejaVu Sans Mono",monospace;color:#d7dae0}</style><pre>' "$line_height"
    awk '
        BEGIN { reset(); split("#d7dae0 #e5534b #57ab5a #c69026 #539bf5 #b083f0 #39c5cf #909dab", palette, " ") }
        function reset() { colour = ""; bold = dim = under = reversed = 0 }
        function take(codes,   count, code, i) {
            count = split(codes == "" ? "0" : codes, code, ";")
            for (i = 1; i <= count; i++) {
                if (code[i] == 0) reset()
                else if (code[i] == 1) bold = 1
                else if (code[i] == 2) dim = 1
                else if (code[i] == 4) under = 1
                else if (code[i] == 7) reversed = 1
                else if (code[i] == 22) bold = dim = 0
                else if (code[i] == 24) under = 0
                else if (code[i] == 27) reversed = 0
                else if (code[i] == 39) colour = ""
                else if (code[i] >= 31 && code[i] <= 37) colour = palette[code[i] - 29]
                else if (code[i] == 38 && code[i + 1] == 5) { colour = palette[code[i + 2] % 8 + 1]; i += 2 }
            }
        }
        function span(text,   front) {
            if (text == "") return
            gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/>/, "\\&gt;", text)
            front = colour == "" ? "#d7dae0" : colour
            printf "<span style=\"%s%s%s%s\">%s</span>", (reversed ? "color:#16181d;background:" front : "color:" front), \
                (bold ? ";font-weight:bold" : ""), (dim ? ";opacity:.6" : ""), (under ? ";text-decoration:underline" : ""), text
        }
        {
            while (match($0, /\033\[[0-9;]*m/)) {
                span(substr($0, 1, RSTART - 1))
                take(substr($0, RSTART + 2, RLENGTH - 3))
                $0 = substr($0, RSTART + RLENGTH)
            }
            span($0)
            print ""
        }'
}

# Nothing but what was started here.
stop() {
    local pid
    terminal kill-server 2>/dev/null || true
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$scratch"
}

started=()
scratch=
session=
number=0
main
