"""A Kaggle of one's own on loopback: speaks the endpoints of Kaggle's real client, and executes what is pushed.

Answers are built from kagglesdk's own types. A pushed notebook runs in a process of its own, in this environment's
Python, with nothing but a fake /kaggle/input (what it attached), a fake /kaggle/working and what is in the image. Of
each notebook only the newest run that ended without an error can be attached, as on Kaggle.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from ipykernel.kernelspec import get_kernel_dict
from kagglesdk.blobs.types.blob_api_service import ApiStartBlobUploadRequest, ApiStartBlobUploadResponse
from kagglesdk.datasets.types import dataset_api_service as data_sets
from kagglesdk.datasets.types.dataset_enums import DatabundleVersionStatus
from kagglesdk.kernels.types import kernels_api_service as kernels
from kagglesdk.kernels.types.kernels_enums import KernelWorkerStatus
from kagglesdk.security.types.oauth_service import IntrospectTokenRequest, IntrospectTokenResponse

PORT = 7777  # where the client looks under KAGGLE_API_ENVIRONMENT=TEST
OWNER, TOKEN = "tester", "a-token-of-nobody"
PAGE = 7  # files a page at most, so that lists have several
UNDER_WAY = (KernelWorkerStatus.QUEUED, KernelWorkerStatus.RUNNING)


class Refusal(Exception):
    """An HTTP error to answer with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Span(timedelta):
    """A length of time that the SDK writes whole: it asks for `seconds`, from which a timedelta leaves out its days."""

    seconds = property(lambda self: int(self.total_seconds()))


@dataclass
class Fault:
    """What befalls the next run of a notebook: `kind` is "cancel" or "kill", once a file like `when` is there."""

    kind: str
    when: str


@dataclass
class Run:
    """One version of a notebook and its session."""

    request: Any
    number: int
    folder: Path
    sources: dict[str, list[str]]
    status: KernelWorkerStatus = KernelWorkerStatus.QUEUED
    message: str = ""
    log: str = ""
    inputs_before: dict[str, int] = field(default_factory=dict)

    def inputs(self) -> dict[str, int]:
        """Names of all attached files and folders, with the times of their last change."""
        folder = self.folder / "input"
        return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}

    @property
    def working(self) -> Path:
        """What stands for /kaggle/working."""
        return self.folder / "working"


@dataclass
class DataSet:
    """A data set's versions, each its files by name."""

    versions: list[dict[str, bytes]] = field(default_factory=list)
    hidden: int = 0  # requests for its status that are still answered 403


class StandIn:
    """The platform. Faults are set on its attributes; everything that happened can be read from them."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder, self.environment = folder, environment or {}
        self.runs: dict[str, list[Run]] = {}
        self.data_sets: dict[str, DataSet] = {}
        self.blobs: dict[str, tuple[str, bytes]] = {}
        self.lock = threading.RLock()
        self.threads: list[threading.Thread] = []
        self.processes: list[subprocess.Popen] = []
        self.requests: list[str] = []  # names of the endpoints that were called
        # faults
        self.token = TOKEN
        self.refuse: dict[str, list[str]] = {}  # by the notebook's ending: Kaggle's reasons, one a push
        self.drop: dict[str, int] = {}  # by the notebook's ending: pushes whose sources vanish silently
        self.rename: dict[str, str] = {}  # by the notebook's ending: the name under which it is filed instead
        self.leaves_empty = False  # whether a refused first push leaves an empty notebook, which takes no version
        self.empty: set[str] = set()  # such notebooks; what is found out about them is what users reported
        self.unknown_code = 500  # what is answered to who asks for their metadata: 500, 404; 200: a draft, made by hand
        self.deletes = True  # whether they can be deleted
        self.attaches_itself = (
            "yes"  # "invalid", "dropped", or the reason why a notebook that attaches itself is refused
        )
        self.late: dict[str, int] = {}  # by endpoint: requests about a notebook that are still answered 404
        self.shape = str  # how the machine's shape is written in answers
        self.faults: dict[str, list[Fault]] = {}  # by the notebook's ending, one a run
        self.session_environment: dict[str, list[dict[str, str]]] = {}  # variables of the next runs
        self.not_ready = 0  # requests answered 403 after a data set was made
        self.cap = 2  # GPU sessions at once
        self.gpu_hours = (0.0, 30.0)  # used and allowed this week
        self.lose_requests: list[str] = []  # endpoints whose next request is dropped before it is read
        self.lose_answers: list[str] = []  # endpoints whose next answer is dropped after it took effect
        self.break_answers: list[str] = []  # endpoints that do what they are asked, and then answer 502, once each
        self.stall: list[str] = []  # endpoints whose answer comes two seconds late, once each
        self.held: set[str] = set()  # endings of notebooks that stay in the queue
        self.play: Callable[[Run], KernelWorkerStatus] | None = None  # stands in for executing a notebook

    # -- server

    def __enter__(self) -> "StandIn":
        self.server = ThreadingHTTPServer(("127.0.0.1", PORT), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.held.clear()
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for thread in self.threads:
            thread.join()
        self.server.shutdown()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def _body(self) -> bytes:
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _send(self, code: int, content: bytes, kind: str) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                name = self.path.rsplit("/", 1)[1]
                site.requests.append(name)
                body = self._body()
                if name in site.lose_requests:
                    site.lose_requests.remove(name)
                    self.close_connection = True
                    return
                try:
                    if name != "IntrospectToken" and self.headers.get("Authorization") != f"Bearer {site.token}":
                        raise Refusal(401, "Unauthenticated")
                    with site.lock:
                        answer = site.answer(name, json.loads(body))
                    code, content = 200, type(answer).to_dict(answer)
                except Refusal as refusal:
                    code, content = refusal.code, {"code": refusal.code, "message": str(refusal)}
                if name in site.lose_answers:
                    site.lose_answers.remove(name)
                    self.close_connection = True
                    return
                if name in site.break_answers:  # as a gateway that gives up before the platform does
                    site.break_answers.remove(name)
                    code, content = 502, {"code": 502, "message": "Bad Gateway"}
                if name in site.stall:
                    site.stall.remove(name)
                    time.sleep(2.0)
                self._send(code, json.dumps(content).encode(), "application/json")

            def do_PUT(self) -> None:
                token = self.path.rsplit("/", 1)[1]
                site.blobs[token] = (site.blobs[token][0], self._body())
                self._send(200, b"", "text/plain")

            def do_GET(self) -> None:
                _, _, slug, number, path = urllib.parse.unquote(self.path).split("/", 4)
                file = site.runs[f"{OWNER}/{slug}"][int(number) - 1].working / path
                self._send(200, file.read_bytes(), "application/octet-stream")

        return Handler

    # -- endpoints

    def answer(self, name: str, body: dict[str, Any]) -> Any:
        """Answer one request of the client; raises Refusal."""
        endpoints: dict[str, tuple[type, Callable[[Any], Any]]] = {
            "IntrospectToken": (IntrospectTokenRequest, self._introspect),
            "SaveKernel": (kernels.ApiSaveKernelRequest, self._save_kernel),
            "DeleteKernel": (kernels.ApiDeleteKernelRequest, self._delete_kernel),
            "GetKernel": (kernels.ApiGetKernelRequest, self._get_kernel),
            "GetKernelSessionStatus": (kernels.ApiGetKernelSessionStatusRequest, self._session_status),
            "ListKernelSessionOutput": (kernels.ApiListKernelSessionOutputRequest, self._session_output),
            "StartBlobUpload": (ApiStartBlobUploadRequest, self._start_upload),
            "CreateDataset": (data_sets.ApiCreateDatasetRequest, self._create_data_set),
            "CreateDatasetVersion": (data_sets.ApiCreateDatasetVersionRequest, self._create_version),
            "GetDatasetStatus": (data_sets.ApiGetDatasetStatusRequest, self._data_set_status),
            "GetDataset": (data_sets.ApiGetDatasetRequest, self._get_data_set),
            "ListDatasetFiles": (data_sets.ApiListDatasetFilesRequest, self._list_data_set),
        }
        if hasattr(kernels, "ApiGetAcceleratorQuotaStatisticsRequest"):  # older clients do not ask
            asked = kernels.ApiGetAcceleratorQuotaStatisticsRequest
            endpoints["GetAcceleratorQuotaStatistics"] = (asked, self._quota)
        if name not in endpoints:
            raise Refusal(501, f"the stand-in has no {name}")
        kind, function = endpoints[name]
        return function(kind.from_dict(body))

    def _introspect(self, request: IntrospectTokenRequest) -> IntrospectTokenResponse:
        answer = IntrospectTokenResponse()
        answer.active = request.token == self.token
        answer.username = OWNER if answer.active else ""
        return answer

    def _start_upload(self, request: ApiStartBlobUploadRequest) -> ApiStartBlobUploadResponse:
        answer = ApiStartBlobUploadResponse()
        answer.token = f"blob-{len(self.blobs)}"
        answer.create_url = f"http://localhost:{PORT}/upload/{answer.token}"
        self.blobs[answer.token] = (request.name, b"")
        return answer

    def _files(self, files: list[Any]) -> dict[str, bytes]:
        return dict(self.blobs[file.token] for file in files)

    def _made(self, ref: str, files: list[Any]) -> Any:
        data_set, content = self.data_sets.setdefault(ref, DataSet()), self._files(files)
        if data_set.versions[-1:] != [content]:  # what equals the last version is none
            data_set.versions.append(content)
            data_set.hidden = self.not_ready
        answer = data_sets.ApiCreateDatasetResponse()
        answer.ref, answer.status, answer.url = ref, "ok", f"https://www.kaggle.com/datasets/{ref}"
        return answer

    def _create_data_set(self, request: Any) -> Any:
        ref = f"{request.owner_slug}/{request.slug}"
        if request.owner_slug != OWNER or not 6 <= len(request.title) <= 50:
            raise Refusal(400, "bad title or owner")
        if ref in self.data_sets:
            answer = data_sets.ApiCreateDatasetResponse()
            answer.status, answer.error = "error", f'The requested title "{request.title}" is already in use'
            return answer
        return self._made(ref, request.files)

    def _create_version(self, request: Any) -> Any:
        ref = f"{request.owner_slug}/{request.dataset_slug}"
        if ref not in self.data_sets:
            raise Refusal(404, "Not found")
        return self._made(ref, request.body.files)

    def _known(self, request: Any) -> DataSet:
        data_set = self.data_sets.get(f"{request.owner_slug}/{request.dataset_slug}")
        if data_set is None:
            raise Refusal(404, "Not found")
        if data_set.hidden:
            raise Refusal(403, "Permission 'datasets.get' was denied")
        return data_set

    def _data_set_status(self, request: Any) -> Any:
        data_set = self.data_sets.get(f"{request.owner_slug}/{request.dataset_slug}")
        if data_set and data_set.hidden:
            data_set.hidden -= 1
            raise Refusal(403, "Permission 'datasets.get' was denied")
        self._known(request)
        answer = data_sets.ApiGetDatasetStatusResponse()
        answer.status = DatabundleVersionStatus.READY
        return answer

    def _get_data_set(self, request: Any) -> Any:
        answer = data_sets.ApiDataset()
        answer.current_version_number = len(self._known(request).versions)
        return answer

    def _list_data_set(self, request: Any) -> Any:
        answer, files = data_sets.ApiListDatasetFilesResponse(), []
        for name in self._known(request).versions[-1]:
            file = data_sets.ApiDatasetFile()
            file.name = name
            files.append(file)
        answer.dataset_files = files
        return answer

    def _quota(self, request: Any) -> Any:
        answer = kernels.ApiGetAcceleratorQuotaStatisticsResponse()
        answer.gpu_quota = kernels.ApiAcceleratorQuota()
        answer.gpu_quota.time_used, answer.gpu_quota.total_time_allowed = (Span(hours=h) for h in self.gpu_hours)
        answer.quota_refresh_time = datetime.now(UTC) + timedelta(days=3)
        return answer

    # -- notebooks

    def _kernel(self, request: Any, endpoint: str) -> Run:
        """The run that is asked for: the newest, or that of a label such as v2."""
        ref, label = f"{request.user_name}/{request.kernel_slug}", request.version_label
        if self.late.get(endpoint):
            self.late[endpoint] -= 1
            raise Refusal(404, "Not found")
        runs = [run for run in self.runs.get(ref, []) if label in ("", f"v{run.number}")]
        if not runs:
            raise Refusal(404, "Not found")
        return runs[-1]

    def _delete_kernel(self, request: Any) -> Any:
        ref = f"{request.user_name}/{request.kernel_slug}"
        if ref not in self.empty or not self.deletes:
            raise Refusal(404, "Not found")
        self.empty.remove(ref)
        return kernels.ApiDeleteKernelResponse()

    def _save_kernel(self, request: Any) -> Any:
        answer, ref = kernels.ApiSaveKernelResponse(), request.slug
        if ref in self.empty and self.unknown_code == 404:
            raise Refusal(404, "Notebook not found")
        if ref in self.empty:
            answer.error = "Notebook not found"
            return answer
        stage = next((key for key in self.refuse if ref.endswith(key) and self.refuse[key]), None)
        if stage:
            return self._refused(ref, self.refuse[stage].pop(0))
        busy = [runs[-1] for runs in self.runs.values() if runs[-1].status in UNDER_WAY]
        if request.enable_gpu and sum(run.request.enable_gpu for run in busy) >= self.cap:
            return self._refused(ref, f"Maximum batch GPU session count of {self.cap} reached.")
        sources = {"data": list(request.dataset_data_sources), "kernel": list(request.kernel_data_sources)}
        answer.invalid_dataset_sources = [name for name in sources["data"] if name not in self.data_sets]
        answer.invalid_kernel_sources = [name for name in sources["kernel"] if self._complete(name) is None]
        if ref in sources["kernel"] and self.attaches_itself not in ("yes", "dropped"):
            if self.attaches_itself != "invalid":
                return self._refused(ref, self.attaches_itself)
            answer.invalid_kernel_sources = [*answer.invalid_kernel_sources, ref]
        invalid = {*answer.invalid_dataset_sources, *answer.invalid_kernel_sources}
        sources = {kind: [name for name in names if name not in invalid] for kind, names in sources.items()}
        if self.attaches_itself == "dropped":
            sources["kernel"] = [name for name in sources["kernel"] if name != ref]
        stage = next((key for key in self.drop if ref.endswith(key) and self.drop[key]), None)
        if stage:
            self.drop[stage] -= 1
            sources = {"data": [], "kernel": []}
        ref = next((f"{OWNER}/{name}" for key, name in self.rename.items() if ref.endswith(key)), ref)
        request.slug = ref
        versions = self.runs.setdefault(ref, [])
        folder = self.folder / "sessions" / f"{ref.partition('/')[2]}-{len(versions) + 1}"
        run = Run(request, len(versions) + 1, folder, sources)
        versions.append(run)
        answer.ref, answer.url = f"/{ref}", f"https://www.kaggle.com/code/{ref}"
        answer.version_number = run.number
        self._mount(run)
        thread = threading.Thread(target=self._execute, args=(ref, run), daemon=True)
        self.threads.append(thread)
        thread.start()
        return answer

    def _refused(self, ref: str, reason: str) -> Any:
        answer = kernels.ApiSaveKernelResponse()
        answer.error = reason
        if self.leaves_empty and ref not in self.runs:
            self.empty.add(ref)
        return answer

    def _complete(self, ref: str) -> Run | None:
        done = [run for run in self.runs.get(ref, []) if run.status == KernelWorkerStatus.COMPLETE]
        return done[-1] if done else None

    def _mount(self, run: Run) -> None:
        run.working.mkdir(parents=True)
        inputs = run.folder / "input"
        inputs.mkdir()
        for ref in run.sources["data"]:
            folder = inputs / "datasets" / ref
            folder.mkdir(parents=True)
            for name, content in self.data_sets[ref].versions[-1].items():
                (folder / name).write_bytes(content)
        for ref in run.sources["kernel"]:
            if source := self._complete(ref):
                shutil.copytree(source.working, inputs / "notebooks" / ref)
        run.inputs_before = run.inputs()

    def _get_kernel(self, request: Any) -> Any:
        if f"{request.user_name}/{request.kernel_slug}" in self.empty:
            if self.unknown_code != 200:
                raise Refusal(self.unknown_code, "An internal error occurred")
            answer = kernels.ApiGetKernelResponse()
            answer.metadata = kernels.ApiKernelMetadata()
            return answer
        run = self._kernel(request, "GetKernel")
        metadata = kernels.ApiKernelMetadata()
        metadata.ref, metadata.current_version_number = run.request.slug, run.number
        metadata.enable_gpu, metadata.enable_internet = run.request.enable_gpu, run.request.enable_internet
        metadata.machine_shape = self.shape(run.request.machine_shape)
        metadata.dataset_data_sources = run.sources["data"]
        metadata.kernel_data_sources = run.sources["kernel"]
        metadata.model_data_sources = list(run.request.model_data_sources)
        answer = kernels.ApiGetKernelResponse()
        answer.metadata = metadata
        return answer

    def _session_status(self, request: Any) -> Any:
        run = self._kernel(request, "GetKernelSessionStatus")
        answer = kernels.ApiGetKernelSessionStatusResponse()
        answer.status, answer.failure_message = run.status, run.message
        return answer

    def _session_output(self, request: Any) -> Any:
        run = self._kernel(request, "ListKernelSessionOutput")
        answer = kernels.ApiListKernelSessionOutputResponse()
        names = sorted(path.relative_to(run.working).as_posix() for path in run.working.rglob("*") if path.is_file())
        start, files = int(request.page_token or 0), []
        for name in names[start : start + PAGE]:
            file = kernels.ApiKernelSessionOutputFile()
            slug = run.request.slug.partition("/")[2]
            file.file_name = name
            file.url = f"http://localhost:{PORT}/files/{slug}/{run.number}/{urllib.parse.quote(name)}"
            files.append(file)
        answer.files = files
        answer.next_page_token = str(start + PAGE) if start + PAGE < len(names) else ""
        answer.log = run.log
        return answer

    # -- sessions

    def _execute(self, ref: str, run: Run) -> None:
        while any(ref.endswith(ending) for ending in self.held):
            time.sleep(0.05)
        run.status = KernelWorkerStatus.RUNNING
        if self.play:
            run.status = self.play(run)
            return
        kernel = run.folder / "jupyter" / "kernels" / "python3" / "kernel.json"
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps(get_kernel_dict()))
        notebook, home = run.folder / "__notebook__.ipynb", run.folder / "home"
        notebook.write_text(run.request.text)
        home.mkdir()
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "JUPYTER_PATH": str(run.folder / "jupyter"),
            **{name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
            "HF_HUB_OFFLINE": "1",
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "KAGGLE_CACHE_MOUNT_FOLDER": str(run.folder / "input"),
            "RUNS_ROOT": str(run.working / "runs"),
            **self.environment,
            **self._next(self.session_environment, ref, {}),
        }
        line = [sys.executable, "-m", "papermill", str(notebook), str(run.folder / "executed.ipynb"), "--log-output"]
        process = subprocess.Popen(
            [*line, "--kernel", "python3", "--cwd", str(run.working)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        self.processes.append(process)
        fault = self._next(self.faults, ref, None)
        if fault:
            threading.Thread(target=self._strike, args=(run, process, fault), daemon=True).start()
        events = [{"stream_name": "stdout", "time": 0.0, "data": text} for text in process.stdout]
        run.log = json.dumps(events)
        code = process.wait()
        if run.status == KernelWorkerStatus.CANCEL_REQUESTED:
            run.message, run.status = "", KernelWorkerStatus.CANCEL_ACKNOWLEDGED
        elif code:
            run.message, run.status = "Notebook ended with an error", KernelWorkerStatus.ERROR
        else:
            run.status = KernelWorkerStatus.COMPLETE

    def _next(self, table: dict[str, list[Any]], ref: str, default: Any) -> Any:
        with self.lock:
            key = next((key for key in table if ref.endswith(key) and table[key]), None)
            return table[key].pop(0) if key else default

    def _strike(self, run: Run, process: subprocess.Popen, fault: Fault) -> None:
        """End a session the hard way as soon as the file that is waited for exists."""
        while process.poll() is None and not any(run.working.rglob(fault.when)):
            time.sleep(0.02)
        if process.poll() is not None:
            return
        if fault.kind == "cancel":  # the platform stops the whole session
            run.status = KernelWorkerStatus.CANCEL_REQUESTED
            os.killpg(process.pid, signal.SIGKILL)
            for child in psutil.process_iter(["environ"]):
                if (child.info["environ"] or {}).get("RUNS_ROOT") == str(run.working / "runs"):
                    child.kill()
        else:  # as the system does when memory runs out
            for child in psutil.Process(process.pid).children():
                child.kill()
