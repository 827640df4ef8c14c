from srnn.bench.training_loop import LoopRow
from srnn.files import csv_bytes


def test_a_file_has_so_many_digits_and_quotes():
    row = LoopRow("srnn, pruned", 1.23456, 1.0, 8, 0.25, "2 threads", "2.13.0", "model=gru trainer=fast")
    assert csv_bytes([row.rounded()], quoted=("loop", "options")).decode() == (
        "loop,ms_per_step,ratio,steps,pruning_share,device,torch,options\n"
        '"srnn, pruned",1.235,1.000,8,0.2500,2 threads,2.13.0,"model=gru trainer=fast"\n'
    )
