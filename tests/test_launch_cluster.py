"""The launchers for clusters, with stand-ins for their programs that record what they are asked."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

# Stands in for any program: records its arguments and its input, and answers from a file of lines
# `code text`, one a call.
PROGRAM = r"""#!/usr/bin/env bash
{ printf '%s\x1f' "${0##*/}" "$@"; if [[ ${!#} == - ]]; then cat; fi; printf '\x1e'; } >>"$FAKE/log"
answers=$FAKE/${0##*/}.answers
[[ -s $answers ]] || exit 0
read -r code text <"$answers"
sed -i 1d "$answers"
echo "$text"
exit "$code"
"""


class Machine:
    """A PATH whose cluster programs are stand-ins."""

    def __init__(self, path):
        self.bin = path / "bin"
        self.bin.mkdir()
        self.env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(path),
            "FAKE": str(self.bin),
        }
        for name in ("gcloud", "kubectl", "srun", "scontrol"):
            self.program(name)

    def program(self, name, text=PROGRAM):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def answer(self, name, *lines):
        (self.bin / f"{name}.answers").write_text("".join(line + "\n" for line in lines))

    def start(self, *command, cwd=ROOT, group=None, **env):
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [str(each) for each in command],
            env=self.env | env,
            cwd=cwd,
            process_group=group,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def run(self, *command, **options):
        process = self.start(*command, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def asked(self):
        """The commands recorded since the last call."""
        log = self.bin / "log"
        calls = log.read_text().split("\x1e")[:-1] if log.exists() else []
        log.write_text("")
        return [call.removesuffix("\x1f").split("\x1f") for call in calls]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_clean(script):
    assert "\nset -euo pipefail\n" in script.read_text()
    assert all(len(line) <= 100 for line in script.read_text().splitlines())
    subprocess.run(["bash", "-n", script], check=True)
    checker = shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    assert checker, "no shellcheck; install the extra `dev`"
    found = subprocess.run([checker, "--shell=bash", script], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


# tpu_vm.sh

PLACE = ["--name=n", "--project=p", "--zone=z"]
WHERE = ["--project=p", "--zone=z"]
TPUS = ["gcloud", "compute", "tpus"]
TRAIN = ["python", "-m", "x", "--config=a b", "it's"]


def tpu(machine, verb, *arguments, **env):
    return machine.run(LAUNCH / "tpu_vm.sh", verb, *PLACE, *arguments, **env)


def remote(machine, worker="all"):
    """The command of the one ssh that was asked for."""
    (call,) = [call for call in machine.asked() if "ssh" in call]
    assert call[:-3] == [*TPUS, "tpu-vm", "ssh", "n", f"--worker={worker}"]
    assert call[-2:] == WHERE
    return call[-3].removeprefix("--command=")


@pytest.mark.parametrize("spot", [[], ["--spot"]])
def test_tpu_create_and_delete(machine, spot):
    assert tpu(machine, "create", "--type=v6e-64", "--version=v", *spot)[0] == 0
    assert tpu(machine, "delete")[0] == 0
    wanted = ["--node-id=n", "--accelerator-type=v6e-64", "--runtime-version=v", *spot]
    assert machine.asked() == [
        [*TPUS, "queued-resources", "create", "n", *wanted, *WHERE],
        [*TPUS, "queued-resources", "delete", "n", "--force", "--quiet", *WHERE],
    ]


def test_tpu_wait_says_each_state_once(machine):
    states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    machine.answer("gcloud", *[f"0 {state}" for state in states])
    code, out, err = tpu(machine, "wait", DLC_POLL="0")
    assert (code, err) == (0, "")
    assert [line.split()[-1] for line in out.splitlines()] == [states[0], *states[2:]]
    describe = [*TPUS, "queued-resources", "describe", "n", "--format=value(state.state)"]
    assert machine.asked() == [[*describe, *WHERE]] * 4


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING", "SUSPENDED"])
def test_tpu_wait_ends_when_it_will_not_start(machine, state):
    machine.answer("gcloud", "0 PROVISIONING", f"0 {state}")
    code, _, err = tpu(machine, "wait", DLC_POLL="0")
    assert (code, err.count("\n")) == (2, 1) and "will not start" in err


def test_tpu_wait_ends_when_gcloud_fails(machine):
    machine.answer("gcloud", "1 ")
    assert tpu(machine, "wait", DLC_POLL="0")[0] == 1


def test_tpu_setup_sends_the_last_commit_and_installs(machine):
    machine.program("git")
    assert tpu(machine, "setup")[0] == 0
    _, archive, copy, ssh = machine.asked()
    tar = f"{ROOT}/build/dlc.tar.gz"
    assert archive[1:] == [
        *["-C", str(ROOT), "archive", "--format=tar.gz", f"--output={tar}", "HEAD"]
    ]
    assert copy == [*TPUS, "tpu-vm", "scp", tar, "n:", "--worker=all", *WHERE]
    assert ssh[-3].endswith("DLC_EXTRAS=tpu,gs dlc/launch/local.sh true")


def test_tpu_setup_says_that_changes_stay_behind(machine):
    machine.program("git")
    machine.answer("git", "1 ")
    assert "uncommitted changes" in tpu(machine, "setup")[2]


@pytest.fixture
def worker(machine, tmp_path):
    """What ssh would do on a worker, in `tmp_path`, whose local.sh says what it was asked."""
    launch = tmp_path / "dlc" / "launch"
    launch.mkdir(parents=True)
    shutil.copy(LAUNCH / "supervise.sh", launch)
    (launch / "local.sh").write_text(
        '#!/usr/bin/env bash\ntrap "echo saved; exit 75" TERM\nprintf "%s|" "$DLC_EXTRAS" "$@"\n'
        "echo\nfor i in {1..200}; do sleep 0.05; done\n"
    )
    (launch / "local.sh").chmod(0o755)
    return lambda command: machine.run("bash", "-c", command, cwd=tmp_path)


def test_tpu_run_goes_on_by_itself_under_the_supervisor_and_stop_ends_it(machine, worker, tmp_path):
    assert tpu(machine, "run", "--", *TRAIN)[0] == 0
    command, log = remote(machine), tmp_path / "dlc" / "run.log"
    assert worker(command)[:2] == (0, "")
    wait_for(lambda: log.exists() and "\n" in log.read_text())
    code, _, err = worker(command)
    assert (code, err) == (2, "already running; stop it first\n")
    assert tpu(machine, "stop")[0] == 0
    assert worker(remote(machine))[0] == 0
    wait_for(lambda: "saved" in log.read_text())
    assert log.read_text() == "tpu,gs|" + "|".join(TRAIN) + "|\nsaved\n"
    pid = int((tmp_path / "dlc" / "run.pid").read_text())
    wait_for(lambda: not is_alive(pid))


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def is_alive(pid):
    """False too for a process that nobody has waited for, as may stay in a container."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_tpu_logs(machine):
    assert tpu(machine, "logs")[0] == 0
    assert remote(machine, worker="0") == "tail -n 100 -F dlc/run.log"
    assert tpu(machine, "logs", "--worker=3")[0] == 0
    assert remote(machine, worker="3") == "tail -n 100 -F dlc/run.log"


@pytest.mark.parametrize("verb", "create wait setup run logs stop delete".split())
def test_tpu_dry_run_prints_what_would_be_run(machine, verb):
    more = ["--type=v6e-8", "--version=v", "--", *TRAIN]
    code, out, err = tpu(machine, verb, "--dry-run", *more)
    assert (code, machine.asked()) == (0, [])
    machine.answer("gcloud", "0 ACTIVE")
    assert tpu(machine, verb, *more)[0] == 0
    # the lines are commands of bash: what it reads in them is what is run
    printed = [words for words in machine_commands(out) if words[0] == "gcloud"]
    assert printed and printed == machine.asked()


def machine_commands(text):
    """The commands of a printed script, of which quoted arguments may span lines."""
    commands, lines = [], ""
    for line in text.splitlines(keepends=True):
        lines += line
        try:
            commands.append(shlex.split(lines))
        except ValueError:  # a quotation goes on
            continue
        lines = ""
    return commands


@pytest.mark.parametrize("missing", ["name", "project", "zone", "type", "version"])
def test_tpu_missing_flags(machine, missing):
    given = [each for each in [*PLACE, "--type=t", "--version=v"] if f"-{missing}=" not in each]
    code, out, err = machine.run(LAUNCH / "tpu_vm.sh", "create", *given)
    assert (code, out, err.count("\n"), machine.asked()) == (2, "", 1, [])
    assert f"give --{missing}=" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "is not a verb; expected create"),
        (["start", *PLACE], "'start' is not a verb"),
        (["run", *PLACE], "give the command to run after --"),
        (["delete", *PLACE, "--zoen=z"], "unknown argument '--zoen=z'"),
    ],
)
def test_tpu_mistakes(machine, arguments, said):
    code, out, err = machine.run(LAUNCH / "tpu_vm.sh", *arguments)
    assert (code, out, err.count("\n"), machine.asked()) == (2, "", 1, [])
    assert said in err


# gke.sh

GKE = {
    "context": "gke_p_z_c",
    "name": "run1",
    "image": "r.io/COMMAND/dlc:1",
    "accelerator": "tpu-v6e-slice",
    "topology": "4x8",
    "hosts": "8",
    "chips": "4",
}


def gke(machine, *command, **changed):
    flags = {**GKE, **changed}
    flags = [f"--{key}={value}" for key, value in flags.items() if value is not None]
    return machine.run(LAUNCH / "gke.sh", *flags, *command)


def test_gke_applies_the_filled_in_jobset(machine):
    command = ["python", "-c", 'say "a\\b" & $HOME', "IMAGE"]
    code, out, err = gke(machine, "--", *command, slices="2")
    ((*words, text),) = machine.asked()
    assert (code, err, words) == (0, "", ["kubectl", "--context=gke_p_z_c", "apply", "-f", "-"])
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "run1"
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (2, 8, 8)
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    (container,) = pod["containers"]
    assert (container["image"], container["command"]) == (GKE["image"], command)
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_gke_a_mistake_fails_the_jobset_and_the_rest_restarts_it(machine):
    gke(machine, "--", "train")
    spec = yaml.safe_load(machine.asked()[0][-1])["spec"]
    # every failure restarts all jobs, since no job retries a pod by itself...
    assert spec["failurePolicy"] == {
        "maxRestarts": 100,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    # ...but the one that a rule of the pods names
    (container,) = pod["containers"]
    exit_codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": exit_codes}]}
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_gke_dry_run_prints_the_file_and_the_command(machine):
    code, out, err = gke(machine, "--dry-run", "--", "train")
    assert (code, err, machine.asked()) == (0, "", [])
    assert out.splitlines()[-1] == "# kubectl --context=gke_p_z_c apply -f -"
    gke(machine, "--", "train")
    assert yaml.safe_load(out) == yaml.safe_load(machine.asked()[0][-1])


@pytest.mark.parametrize("missing", list(GKE))
def test_gke_missing_flags(machine, missing):
    code, out, err = gke(machine, "--", "train", **{missing: None})
    assert (code, out, err.count("\n"), machine.asked()) == (2, "", 1, [])
    assert f"give --{missing}=" in err


@pytest.mark.parametrize(
    ("command", "changed", "said"),
    [
        ([], {}, "give the command to run after --"),
        (["--", "a\nb"], {}, "line break"),
        (["train"], {}, "unknown argument 'train'"),
        (["--", "train"], {"hosts": "0"}, "--hosts=0 is not a positive whole number"),
        (["--", "train"], {"chips": "8"}, "--topology=4x8 is not --hosts=8 with --chips=8 each"),
        (["--", "train"], {"topology": "v5e"}, "expected as in 4x8"),
        (["--", "train"], {"name": "a: b"}, "has a character that is not allowed"),
    ],
)
def test_gke_mistakes(machine, command, changed, said):
    code, out, err = gke(machine, *command, **changed)
    assert (code, out, err.count("\n"), machine.asked()) == (2, "", 1, [])
    assert said in err


# slurm.sbatch

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4"}
SRUN = ["srun", "--kill-on-bad-exit=0", "--wait=300", "./launch/local.sh"]


@pytest.fixture
def checkout(tmp_path):
    """A folder to submit from, whose local.sh records the install."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "local.sh").write_text(PROGRAM)
    (tmp_path / "launch" / "local.sh").chmod(0o755)
    return tmp_path


def slurm(machine, checkout, *command, **env):
    # as SLURM does: a copy in another folder runs in the one that it was submitted from
    script = shutil.copy(LAUNCH / "slurm.sbatch", checkout / "bin")
    return machine.run("bash", script, *command, cwd=checkout, **env)


def test_slurm_options():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(options)
    assert not [each for each in options if re.match("--(partition|account|qos)", each)]
    # SLURM reads no options below the first command
    assert text.rindex("#SBATCH") < text.index("\nset -euo")


@pytest.mark.parametrize("code", [0, 2, 75, 1, 137])
def test_slurm_requeues_all_but_complete_and_mistakes(machine, checkout, code):
    machine.answer("srun", f"{code} ")
    result, _, err = slurm(machine, checkout, *TRAIN, **JOB)
    install, srun, *requeue = machine.asked()
    assert install == ["local.sh", "true"]
    assert srun == [*SRUN, *TRAIN]
    if code in (0, 2):
        assert (result, requeue, err) == (code, [], "")
    else:
        assert (result, requeue) == (0, [["scontrol", "requeue", "7"]])
        assert err == f"slurm.sbatch: ended with code {code}; back into the queue\n"


def test_slurm_gives_up(machine, checkout):
    machine.answer("srun", "75 ")
    counts = {"SLURM_RESTART_COUNT": "3", "DLC_RESTARTS": "3"}
    result, _, err = slurm(machine, checkout, *TRAIN, **JOB, **counts)
    assert (result, len(machine.asked())) == (75, 2) and "giving up after 3 restarts" in err


def test_slurm_tells_the_tasks_their_environment(machine, checkout):
    machine.program("srun", '#!/usr/bin/env bash\necho "$DLC_EXTRAS $SRUN_CPUS_PER_TASK"\n')
    more = {"SLURM_CPUS_PER_TASK": "12"}
    assert "cuda 12\n" in slurm(machine, checkout, *TRAIN, **JOB, **more)[1]


def test_slurm_dry_run(machine, checkout):
    code, out, _ = slurm(machine, checkout, "--dry-run", "python", "-m", "x")
    assert (code, machine.asked()) == (0, [])
    install, srun, requeue = out.splitlines()
    assert install == "./launch/local.sh true"
    assert srun == " ".join([*SRUN, "python", "-m", "x"])
    assert requeue == "scontrol requeue JOB"


@pytest.mark.parametrize(
    ("command", "changed", "said"),
    [
        ([], {}, "no command given"),
        (["x"], {"SLURM_JOB_ID": ""}, "give this file to sbatch"),
        (["x"], {"SLURM_GPUS_ON_NODE": "0"}, "no GPUs"),
        (["x"], {"SLURM_NTASKS_PER_NODE": "1"}, "1 tasks for 4 GPUs"),
    ],
)
def test_slurm_mistakes(machine, checkout, command, changed, said):
    code, out, err = slurm(machine, checkout, *command, **JOB | changed)
    assert (code, out, err.count("\n"), machine.asked()) == (2, "", 1, [])
    assert said in err


def test_slurm_outside_a_checkout(machine, checkout):
    (checkout / "launch" / "local.sh").unlink()
    code, _, err = slurm(machine, checkout, "x", **JOB)
    assert (code, err.count("\n")) == (2, 1) and "submit from the checkout's folder" in err


# supervise.sh

SUPERVISE = LAUNCH / "supervise.sh"


@pytest.fixture
def clock(machine):
    """`sleep` and `date` of a clock that the command and the waits move on."""
    (machine.bin / "now").write_text("0\n")
    machine.program("date", '#!/usr/bin/env bash\ncat "$FAKE/now"\n')
    machine.program(
        "sleep",
        '#!/usr/bin/env bash\necho "$1" >>"$FAKE/waits"\n'
        'echo "$(($(<"$FAKE/now") + $1))" >"$FAKE/now"\n',
    )
    return lambda: [int(line) for line in (machine.bin / "waits").read_text().split()]


# Which run of the command it is, from 0.
COUNTED = 'run=$(cat "$FAKE/runs" 2>/dev/null || echo 0); echo $((run + 1)) >"$FAKE/runs"; '


def test_supervise_restarts_until_complete(machine, clock):
    script = COUNTED + (
        'echo "run $run"; case $run in 0) exit 75;; 1) exit 1;; 2) kill -9 $$;; esac'
    )
    code, out, err = machine.run(SUPERVISE, "bash", "-c", script)
    assert (code, out) == (0, "run 0\nrun 1\nrun 2\nrun 3\n")
    assert err.splitlines() == [
        "supervise.sh: bash stopped with code 75 (resumable) after 0 s; restart 1 in 5 s",
        "supervise.sh: bash failed with code 1 after 0 s; restart 2 in 10 s",
        "supervise.sh: bash was ended by SIGKILL after 0 s; restart 3 in 20 s",
    ]


@pytest.mark.parametrize("code", [0, 2])
def test_supervise_stops_at(machine, clock, code):
    script = "echo run; exit " + str(code)
    assert machine.run(SUPERVISE, "bash", "-c", script) == (code, "run\n", "")


def test_supervise_waits_longer_each_time_and_gives_up(machine, clock):
    code, _, err = machine.run(SUPERVISE, "bash", "-c", "exit 75", DLC_RESTARTS="8")
    assert (code, clock()) == (75, [5, 10, 20, 40, 80, 160, 300, 300])
    assert err.splitlines()[-1].endswith("after 0 s; giving up after 8 restarts")


@pytest.mark.parametrize(("seconds", "waits"), [(599, [2, 4, 8]), (600, [2, 4, 2])])
def test_supervise_waits_little_after_a_long_run(machine, clock, seconds, waits):
    later = f'echo $(($(<"$FAKE/now") + {seconds})) >"$FAKE/now"'
    script = f"{COUNTED}((run != 2)) || {later}; exit 1"
    limits = {"DLC_RESTARTS": "3", "DLC_BACKOFF": "2"}
    assert machine.run(SUPERVISE, "bash", "-c", script, **limits)[0] == 1
    assert clock() == waits


STOPS = (
    "trap 'echo saved; exit 75' TERM INT HUP; echo ready; for i in {1..200}; do sleep 0.05; done"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_supervise_passes_signals_on_and_stops(machine, number):
    process = machine.start(SUPERVISE, "bash", "-c", STOPS)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("saved\n", "") and process.returncode == 75


def test_supervise_waits_for_a_command_that_ignores_the_first_signal(machine):
    script = (
        "n=0; trap 'n=$((n + 1)); echo $n; ((n < 2)) || exit 0' TERM; "
        "echo ready; while :; do sleep 0.05; done"
    )
    process = machine.start(SUPERVISE, "bash", "-c", script)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "2\n" and process.returncode == 0


def test_supervise_stops_while_it_waits(machine):
    process = machine.start(SUPERVISE, "bash", "-c", "echo run; exit 75", DLC_BACKOFF="60")
    assert "restart 1 in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("run\n", "") and process.returncode == 75


def test_supervise_a_suspended_command_is_not_started_twice(machine, tmp_path):
    script = "echo $$; kill -STOP $$; exit 2"
    process = machine.start(SUPERVISE, "bash", "-c", script, DLC_BACKOFF="0")
    pid = int(process.stdout.readline())
    time.sleep(0.3)
    os.kill(pid, signal.SIGCONT)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 2


def test_supervise_dry_run(machine):
    code, out, err = machine.run(SUPERVISE, "--dry-run", "bash", "-c", "echo x")
    assert (code, shlex.split(out.replace("\\ ", "' '")), err) == (0, ["bash", "-c", "echo x"], "")


@pytest.mark.parametrize(
    ("command", "env", "said"),
    [
        ([], {}, "no command given"),
        (["no_such_program"], {}, "command not found: no_such_program"),
        (["true"], {"DLC_RESTARTS": "many"}, "DLC_RESTARTS is 'many'"),
        (["true"], {"DLC_BACKOFF": "0.5"}, "DLC_BACKOFF is '0.5'"),
    ],
)
def test_supervise_mistakes(machine, command, env, said):
    code, out, err = machine.run(SUPERVISE, *command, **env)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err


# local_multiprocess.py

LOCAL = [sys.executable, LAUNCH / "local_multiprocess.py"]


def load():
    path = LAUNCH / "local_multiprocess.py"
    spec = importlib.util.spec_from_file_location("local_multiprocess", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_local_processes_are_one_job(machine):
    names = "JAX_PROCESS_ID JAX_NUM_PROCESSES JAX_PLATFORMS XLA_FLAGS JAX_COORDINATOR_ADDRESS"
    script = "; ".join(f'echo "${name}"' for name in names.split())
    devices = "--xla_force_host_platform_device_count"
    env = {**machine.env, "XLA_FLAGS": f"--a=1 {devices}=9 --b=2"}
    processes = load().start(
        3, 2, ["bash", "-c", script], env=env, stdout=subprocess.PIPE, text=True
    )
    lines = [process.communicate(timeout=30)[0].splitlines() for process in processes]
    address = lines[0][-1]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
    flags = f"--a=1 --b=2 {devices}=2"
    assert lines == [[str(i), "3", "cpu", flags, address] for i in range(3)]


def test_local_prefixes_every_line(machine):
    script = 'echo "out $JAX_PROCESS_ID"; echo more; echo "err $JAX_PROCESS_ID" >&2; printf last'
    code, out, err = machine.run(*LOCAL, "-n", 2, "bash", "-c", script)
    assert code == 0
    for i in range(2):
        mine = [line for line in out.splitlines() if line.startswith(f"[{i}]")]
        assert mine == [f"[{i}] out {i}", f"[{i}] more", f"[{i}] last"]
    assert sorted(err.splitlines()) == ["[0] err 0", "[1] err 1"]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0, 0], 0),
        ([0, 75, 2], 2),
        ([1, 75, 0], 75),
        ([0, -9, 1], 137),
        ([0, 3, -9], 3),
    ],
)
def test_local_exit_code(machine, codes, code):
    assert load().exit_code(codes) == code
    ends = [f"kill -{-each} $$" if each < 0 else f"exit {each}" for each in codes]
    script = "case $JAX_PROCESS_ID in 0) {};; 1) {};; 2) {};; esac".format(*ends)
    assert machine.run(*LOCAL, "-n", 3, "bash", "-c", script)[0] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_signals_reach_every_process_once(machine, number):
    process = machine.start(*LOCAL, "-n", 2, "bash", "-c", STOPS)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"] and process.returncode == 75


@pytest.mark.parametrize("launcher", [[SUPERVISE], [*LOCAL, "-n", 1]], ids=["supervise", "local"])
def test_ctrl_c_in_a_terminal_reaches_the_command_once(machine, launcher):
    script = (
        "import os, signal, time; signal.signal(2, lambda *_: os.write(1, b'heard\\n')); "
        "os.write(1, b'ready\\n'); time.sleep(1); exit(75)"
    )
    process = machine.start(*launcher, sys.executable, "-c", script, group=0)
    assert "ready" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all that run in front
    assert process.communicate(timeout=30)[0].count("heard") == 1 and process.returncode == 75


def test_local_dry_run(machine):
    code, out, err = machine.run(*LOCAL, "-n", 2, "-d", 4, "--dry-run", "x", "a b")
    assert (code, err) == (0, "")
    commands = [shlex.split(line) for line in out.splitlines()]
    for i, words in enumerate(commands):
        assert words[0] == "env" and words[-3:] == [f"JAX_PROCESS_ID={i}", "x", "a b"]
        assert "XLA_FLAGS=--xla_force_host_platform_device_count=4" in words
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x"], "-n"),
        (["-n", 2], "a command"),
        (["-n", 0, "x"], "-n of at least 1"),
        (["-n", 1, "-d", 0, "x"], "-d of at least 1"),
        (["-n", 1, "no_such_program"], "cannot start no_such_program"),
    ],
)
def test_local_mistakes(machine, arguments, said):
    code, out, err = machine.run(*LOCAL, *arguments)
    assert (code, out) == (2, "") and said in err.splitlines()[-1]
