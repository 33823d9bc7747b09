import time,sys
sys.path.insert(0,'/work/main/tests')
def test_x(tiny,tmp_path,distilled):
    from multitask_kd.engine.train import train
    for _ in range(2):
        t=time.time(); train(tiny(tmp_path/str(_),{"train.steps":20})); print('T',time.time()-t)
    t=time.time(); train(tiny(tmp_path/"d",{"train.steps":20,**distilled})); print('T',time.time()-t)
