"""The client code of the spec, sections 9 and 11, run as it is written there but for BASE_URL."""
import json

import pytest
from conftest import insert_run

import ailab
import lab_logger

SECTION_9 = '''
import requests

BASE_URL = "http://localhost:8000"

def ask(query: str):
    resp = requests.post(f"{BASE_URL}/agent/query", json={"query": query}, timeout=300)
    print("STATUS:", resp.status_code)
    print("RESPONSE:")
    print(resp.json())

if __name__ == "__main__":
    ask("List my top runs by val_accuracy.")
    ask("Compare two best runs and tell me which is better.")
    ask("Flag the best run for publishing.")
    ask("Summarize my experiments.")
'''
SECTION_11_1 = '''
import requests

BASE_URL = "http://localhost:8000"

def query_agent(user_text: str):
    resp = requests.post(
        f"{BASE_URL}/agent/query",
        json={"query": user_text},
        timeout=60,
    )
    data = resp.json()
    print(data["natural_language_answer"])
    print("Runs referenced:", data["used_run_ids"])
'''
SECTION_11_2 = '''
import pandas as pd
import requests

BASE_URL = "http://localhost:8000"

# 1) Fetch leaderboard
runs = requests.get(
    f"{BASE_URL}/runs/leaderboard?metric_name=accuracy&top_k=5"
).json()

# 2) Pick one run
run_id = runs[0]["run_id"]
detail = requests.get(f"{BASE_URL}/runs/{run_id}").json()

# 3) Choose metrics CSV artifact
metrics_csv = [
    p for p in detail["artifacts"]
    if "metrics_" in p and p.endswith(".csv")
][0]

df = pd.read_csv(metrics_csv)
# Now you can plot df["epoch"], df["train_loss"], df["val_loss"], etc.
'''


@pytest.fixture
def execute(lab, server, monkeypatch):
    """Run a snippet against the test's server; returns its names."""
    for key in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)

    def run(code, name="snippet"):
        assert code.count('"http://localhost:8000"') == 1
        code = code.replace("localhost:8000", f"localhost:{server.server_port}")
        names = {"__name__": name}
        exec(code, names)                         # noqa: S102  our own text above
        return names
    return run


def test_leaderboard_detail_and_metrics_csv_of_section_11_2_lead_to_a_data_frame(
        execute, lab, tmp_path):
    csv = tmp_path / "logistic_regression_metrics_1733000000.csv"
    csv.write_text("epoch,train_loss,val_loss,accuracy\n1,0.5,0.6,0.9\n2,0.4,0.5,0.97\n")
    insert_run(lab.conn, run_id="the-best-run", final_metrics_json='{"accuracy": 0.97}',
               artifacts_json=json.dumps([str(tmp_path / "model.joblib"), str(csv)]))
    with lab_logger.transaction(lab.conn):
        ailab.refresh(lab.conn)
    names = execute(SECTION_11_2)
    assert names["run_id"] == "the-best-run"
    assert len(names["runs"]) == 5
    assert names["df"]["accuracy"].tolist() == [0.9, 0.97]


def test_the_question_of_section_11_1_is_answered(execute, capsys, lab):
    names = execute(SECTION_11_1)
    names["query_agent"]("Show me my top 3 runs by accuracy and compare them.")
    answer, _, referenced = capsys.readouterr().out.partition("Runs referenced:")
    assert "0.95" in answer
    top = [lab.ids[name] for name in ("lr_01", "svm_01", "svm_001")]
    assert all(run_id in referenced for run_id in top)


def test_the_smoke_test_of_section_9_gets_four_answers(execute, capsys, lab):
    execute(SECTION_9, "__main__")
    out = capsys.readouterr().out
    assert out.count("STATUS: 200") == 4
    assert out.count("natural_language_answer") == 4
    noted = {run_id for run_id, in lab.conn.execute(
        "SELECT run_id FROM runs WHERE note LIKE '%PUBLISH%'")}
    assert noted <= {lab.ids["lr_01"], lab.ids["svm_01"]}     # it flagged one of the two best
    assert noted


def test_a_request_written_by_hand_as_section_6_writes_it_is_understood(api, lab):
    status, _, run = api("PATCH", f"/runs/{lab.ids['lr_001']}/note",
                         '{\n  "note": "PUBLISH: best validation accuracy"\n}',
                         {"Content-Type": "application/json"})
    assert (status, run["note"]) == (200, "PUBLISH: best validation accuracy")
    status, _, answer = api(
        "POST", "/agent/query",
        '{\n  "query": "List my top runs by accuracy and compare the best two."\n}',
        {"Content-Type": "application/json"})
    assert status == 200
    assert {"intent", "natural_language_answer", "used_run_ids", "comparison",
            "flagged_run_id"} <= set(answer)
    assert set(answer["used_run_ids"]) >= {lab.ids["lr_01"], lab.ids["svm_01"]}


def test_health_says_what_section_6_says(api):
    answer = api("GET", "/health")[2]
    assert (answer["status"], answer["project"]) == ("ok", "ai-lab")
